"""Overlap of training data and benchmarks: problems that share 13 words in a row with a row that
a model is trained on (Brown et al., arXiv 2005.14165, appendix C).

A problem of fewer words overlaps if it is the whole prompt of a row, case and spaces aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from threadweaver.data.columns import Unsplit, example_of
from threadweaver.data.files import read_rows
from threadweaver.trajectory import Prompt

WORDS = 13
MOST_EXAMPLES = 3
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Text(NamedTuple):
    """What is compared of a row: its prompt, and what else it holds; and where it stands."""

    source: str
    prompt: str
    rest: str = ""


class Shared(NamedTuple):
    """An example: where the problem and the row stand, and the words that both have."""

    problem: str
    row: str
    words: str


@dataclass
class Overlap:
    """How much is shared.

    Attributes:
        problems, rows: how many were compared.
        problems_shared, rows_shared: how many of them have words in common with the others.
        examples: the first few.
    """

    problems: int = 0
    rows: int = 0
    problems_shared: int = 0
    rows_shared: int = 0
    examples: list[Shared] = field(default_factory=list)

    def lines(self) -> list[str]:
        """To show: how much, and the examples."""
        some = f"{self.problems_shared:,}" if self.problems_shared else "none"
        lines = [
            f"overlap: {some} of {self.problems:,} problems and {self.rows_shared:,} of "
            f"{self.rows:,} training rows have {WORDS} words in a row, or a shorter prompt, in "
            "common"
        ]
        return lines + [f"  {one.problem} and {one.row}: {one.words!r}" for one in self.examples]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        examples = [one._asdict() for one in self.examples]
        return {**self.__dict__, "words": WORDS, "examples": examples}


def texts_of_files(paths: Iterable[str]) -> Iterator[Text]:
    """The rows of data files: all that a `qwen_text` holds, where nothing says what of it is the
    response. Raises DataError as `read_examples`."""
    for path in paths:
        for source, row in read_rows(path):
            try:
                example = example_of(row, source, responses=False)
                prompt, response = text_of(example.prompt), example.response
            except Unsplit:
                prompt = response = ""
            # A response that cannot be trained on counts too.
            text = response or row.get("qwen_text") or row.get("response") or ""
            yield Text(source, prompt, text)


def text_of(prompt: Prompt) -> str:
    """What a prompt says; of messages, what users do."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt if turn["role"] == "user")


def find_overlap(problems: Iterable[Text], rows: Iterable[Text]) -> Overlap:
    """Compares the prompts of problems with all that training rows hold."""
    found, shared = Overlap(), set()
    # Numbers of the problems that have it; a prompt may stand in several.
    whole: dict[str, list[int]] = {}
    grams: dict[int, tuple[list[str], list[int]]] = {}  # by hash, with the words
    sources: list[str] = []
    for number, problem in enumerate(problems):
        sources.append(problem.source)
        words = _words(problem.prompt)
        if len(words) < WORDS:
            whole.setdefault(_plain(problem.prompt), []).append(number)
        for at, key in enumerate(_hashes(words)):
            _, numbers = grams.setdefault(key, (words[at : at + WORDS], []))
            if number not in numbers[-1:]:
                numbers.append(number)
    found.problems = len(sources)
    for row in rows:
        found.rows += 1
        hits: dict[int, str] = {}
        for number in whole.get(_plain(row.prompt), ()):
            hits[number] = row.prompt.strip()
        words = _words(f"{row.prompt}\n{row.rest}")
        for at, key in enumerate(_hashes(words)):
            gram, numbers = grams.get(key, ([], []))
            if gram == words[at : at + WORDS]:  # and not its hash alone
                for number in numbers:
                    hits.setdefault(number, " ".join(gram))
        for number, text in hits.items():
            if number not in shared and len(found.examples) < MOST_EXAMPLES:
                found.examples.append(Shared(sources[number], row.source, text[:200]))
            shared.add(number)
        found.rows_shared += bool(hits)
    found.problems_shared = len(shared)
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _hashes(words: list[str]) -> list[int]:
    """One for every run of WORDS words, [max(len(words) - WORDS + 1, 0)]."""
    count = len(words) - WORDS + 1
    if count < 1:
        return []
    each = np.array([hash(word) & 0xFFFFFFFFFFFFFFFF for word in words], np.uint64)
    sums = np.zeros(count, np.uint64)
    for offset in range(WORDS):
        sums = sums * _BASE + each[offset : offset + count]  # modulo 2^64
    return sums.tolist()
