r"""The forms of replies as grammars, and their next tokens by the package xgrammar.

Forms are of bounded length, so that what keeps to one ends before most limits, and can be read
(`read_map`, `read_independent`, `read_outlines`). A map (map_form.py) keeps all rules too, while
replacements and outlines may break one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from threadweaver.annotate.form import Form, whole

if TYPE_CHECKING:
    import xgrammar

MOST_REPLACEMENTS = 6
# Text is of pieces: a run of hundreds of single characters takes ten times as long to compile.
MOST_WORDS, MOST_PIECES, MOST_LETTERS = 14, 8, 20
MISSING = (
    "teacher: its replies are checked and repeated, but not held to their form, since the package "
    "'xgrammar' is missing: pip install 'threadweaver[grammar]'"
)


def words(excluded: str = "") -> str:
    """GBNF of one line of words, without some characters."""
    return rf"""
words ::= word (" " word){{0,{MOST_WORDS - 1}}}
word ::= [^{excluded}\x00-\x20]{{1,{MOST_LETTERS}}}
"""


def independent_form() -> Form:
    """Of a list of replacements."""
    return whole(rf"""
root ::= "[" (item (", " item){{0,{MOST_REPLACEMENTS - 1}}})? "]"
item ::= "{{\"src\": \"" some{{1,{MOST_PIECES}}} "\", \"dest\": \"" some{{0,{MOST_PIECES}}} "\"}}"
some ::= char{{1,{MOST_LETTERS}}}
char ::= [^"\\\x00-\x1f] | "\\" ["\\nt]
""")


def outline_form(count: int) -> Form:
    """Of so many outlines."""
    lines = " ".join(rf'"<Outline>{n}: " words "</Outline>\n"' for n in range(1, count + 1))
    return whole(rf'root ::= "<Outlines>\n" {lines} "</Outlines>"' + words("<>"))


class Grammars:
    """Grammars for one vocabulary.

    Args:
        end_ids: tokens that end a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]):
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=list(end_ids))
        self._compiler = xgrammar.GrammarCompiler(info)
        self._tokenizer = tokenizer
        self.end_ids = list(end_ids)
        self.size = info.vocab_size

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

    def matcher(self, grammar: str) -> xgrammar.GrammarMatcher:
        """The start of a text of a grammar, which is compiled once."""
        import xgrammar

        compiled = self._compiler.compile_grammar(grammar)
        return xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)

    def text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list comes back only for a batch
        return text


class FormConstraint:
    """Holds one reply to a form. See `threadweaver.generate.constraint.Constraint`."""

    def __init__(self, grammars: Grammars, form: Form):
        self._grammars, self._form = grammars, form
        self._ids: list[int] = []
        self._bits = np.full((1, -(-grammars.size // 32)), -1, np.int32)
        self._begin_part()

    def allowed(self, vocabulary: int) -> Tensor:
        """See `Constraint`. Ids that the tokenizer does not have are not allowed."""
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        if self._matcher is not None:
            self._matcher.fill_next_token_bitmask(self._bits)
            bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
            known = min(self._grammars.size, vocabulary)
            allowed[:known] = torch.from_numpy(bits[:known]).bool()
        if self._may_end:
            allowed[self._grammars.end_ids] = True
        return allowed

    def accept(self, token: int) -> None:
        if self._may_end and token in self._grammars.end_ids:
            return
        if self._matcher is None or not self._matcher.accept_token(token):
            raise ValueError(f"token {token} is not one that the form allows")
        self._ids.append(token)
        self._may_end = False
        if self._matcher.is_terminated():
            self._begin_part()

    def _begin_part(self) -> None:
        part = self._form(self._grammars.text(self._ids) if self._ids else "")
        self._may_end = part is None or part.may_end
        self._matcher = None if part is None else self._grammars.matcher(part.grammar)
