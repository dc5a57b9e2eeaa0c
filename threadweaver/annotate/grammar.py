r"""The form of each reply as a grammar, and its next tokens by the package xgrammar.

Grammars are in GBNF, of bounded length, so that what keeps to one ends before most limits. A text
of the grammar can be read (`read_map`, `read_independent`, `read_outlines`); it may break a rule.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from threadweaver.annotate.map import KINDS, PARALLEL

if TYPE_CHECKING:
    import xgrammar

MOST_STEPS, MOST_GROUPS, MOST_UNITS = 30, 8, 6
MOST_REPLACEMENTS, MOST_SOURCE = 6, 160  # characters
# Of words, since a run of hundreds of single characters takes ten times as long to compile.
MOST_WORDS, MOST_LETTERS = 14, 20
MISSING = (
    "teacher: its replies are checked and repeated, but not held to their form, since the package "
    "'xgrammar' is missing: pip install 'threadweaver[grammar]'"
)


def map_grammar(line_count: int) -> str:
    """Of a map of a reasoning of so many lines."""
    number = f"[1-9] [0-9]{{0,{len(str(line_count)) - 1}}}"
    kinds = " | ".join(f'"{kind}"' for kind in KINDS)
    return rf"""
root ::= "1 [1-" line "] " rest ("\n" step){{0,{MOST_STEPS - 1}}} ("\n" group){{0,{MOST_GROUPS}}}
step ::= name " [" line "-" line "] " rest
rest ::= ({kinds}) ": " word (" " word){{0,{MOST_WORDS - 1}}}
word ::= [^\x00-\x20]{{1,{MOST_LETTERS}}}
group ::= "{PARALLEL} " unit (" | " unit){{1,{MOST_UNITS - 1}}}
unit ::= name ("-" name)?
name ::= count ("." count)?
count ::= [1-9] [0-9]?
line ::= {number}
"""


def independent_grammar() -> str:
    """Of a list of replacements."""
    return rf"""
root ::= "[" (item (", " item){{0,{MOST_REPLACEMENTS - 1}}})? "]"
item ::= "{{\"src\": \"" char{{1,{MOST_SOURCE}}} "\", \"dest\": \"" char{{0,{MOST_SOURCE}}} "\"}}"
char ::= [^"\\\x00-\x1f] | "\\" ["\\nt]
"""


def outline_grammar(count: int) -> str:
    """Of so many outlines."""
    lines = " ".join(rf'"<Outline>{n}: " text "</Outline>\n"' for n in range(1, count + 1))
    return rf"""
root ::= "<Outlines>\n" {lines} "</Outlines>"
text ::= word (" " word){{0,{MOST_WORDS - 1}}}
word ::= [^<>\x00-\x20]{{1,{MOST_LETTERS}}}
"""


class Grammars:
    """Grammars for one vocabulary.

    Args:
        end_ids: tokens that end a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]):
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=list(end_ids))
        self._compiler = xgrammar.GrammarCompiler(info)
        self._size = info.vocab_size

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
    ) -> tuple[Grammars | None, str | None]:
        """None, and a line to show, where the package is missing or cannot read the tokenizer."""
        if importlib.util.find_spec("xgrammar") is None:
            return None, MISSING
        try:
            return cls(tokenizer, end_ids), None
        except (ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            return None, f"teacher: its replies are not held to their form: {reason}"

    def constraint(self, grammar: str) -> GrammarConstraint:
        """The start of a reply. A grammar is compiled once."""
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._compiler.compile_grammar(grammar))
        return GrammarConstraint(matcher, self._size)


class GrammarConstraint:
    """See `threadweaver.generate.constraint.Constraint`."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, size: int):
        self._matcher, self._size = matcher, size
        self._bits = np.full((1, -(-size // 32)), -1, np.int32)

    def allowed(self, vocabulary: int) -> Tensor:
        """See `Constraint`. Ids that the tokenizer does not have are not allowed."""
        self._matcher.fill_next_token_bitmask(self._bits)
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        known = min(self._size, vocabulary)
        return torch.from_numpy(np.pad(bits[:known], (0, vocabulary - known))).bool()

    def accept(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} is not one that the grammar allows")
