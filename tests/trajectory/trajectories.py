"""Random trajectories, written call by call as the state machine writes them.

The text grows by the rules of docs/semantics.md, "State machine": the calls are known by
construction, without the code under test.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from threadweaver.trajectory import TAGS, Codec

VOCAB = {
    **{character: i for i, character in enumerate("0123456789abcdefgh:,. <>/\n")},
    **{tag: 100 + i for i, tag in enumerate(TAGS)},
    "<eos>": 120,
}
CODEC = Codec.from_vocab(VOCAB, eos_id=120)


# The oracles are slower than what they check, and the machine may be busy.
unhurried = settings(deadline=None, max_examples=60)


class Trajectory(NamedTuple):
    prompt: str
    response: str
    calls: list[tuple[str, str]]  # context, completion

    @property
    def text(self) -> str:
        return self.prompt + self.response

    @property
    def ids(self) -> list[int]:
        return CODEC.encode(self.text)

    @property
    def prompt_length(self) -> int:
        return len(CODEC.encode(self.prompt))


class Block(NamedTuple):
    before: str
    threads: list[tuple[str, Line]]  # what its outline says, and the thread


class Line(NamedTuple):
    """Content of the main line or of a thread."""

    blocks: list[Block]
    end: str


def write(line: Line, context: str, calls: list[tuple[str, str]], stop: str) -> str:
    """Lets the state machine run along a line; returns the context at its end."""
    completion = ""
    for before, threads in line.blocks:
        outlines = "".join(
            f"<Outline>{n}: {text}</Outline>\n" for n, (text, _) in enumerate(threads, 1)
        )
        completion += f"{before}<Parallel>\n<Outlines>\n{outlines}</Outlines>"
        calls.append((context, completion))
        context += completion
        joined = ""
        for n, (_, thread) in enumerate(threads, 1):
            header = f"<Thread>\n{n}:"
            thread_context = f"{context}\n{header}"
            end = write(thread, thread_context, calls, "</Thread>")
            joined += header + end[len(thread_context) :]
        context += f"\n{joined}\n"
        completion = "</Parallel>"
    completion += line.end + stop
    if completion:
        calls.append((context, completion))
    return context + completion


# Threads may start alike or be equal; few letters make that happen.
_text = st.text("ab1:. \n", max_size=5)


def _lines(max_depth: int) -> st.SearchStrategy[Line]:
    if max_depth == 0:
        return st.builds(Line, st.just([]), _text)
    outline = st.text("ab1:.", min_size=1, max_size=3)
    threads = st.lists(st.tuples(outline, _lines(max_depth - 1)), min_size=1, max_size=3)
    blocks = st.lists(st.builds(Block, _text, threads), max_size=2)
    return st.builds(Line, blocks, _text)


@st.composite
def trajectories(draw: st.DrawFn, max_depth: int = 1) -> Trajectory:
    """Well-formed trajectories whose blocks nest at most max_depth deep."""
    prompt = draw(_text)
    calls: list[tuple[str, str]] = []
    line = draw(_lines(max_depth))
    if draw(st.booleans()):
        prompt += "<think>\n"
        line = line._replace(end=line.end + "</think>a")
    text = write(line, prompt, calls, draw(st.sampled_from(["", "<eos>"])))
    return Trajectory(prompt, text[len(prompt) :], calls)


EXAMPLE = """<think>
two parts
<Parallel>
<Outlines>
<Outline>1: the first</Outline>
<Outline>2: the second</Outline>
</Outlines>
<Thread>
1: one</Thread><Thread>
2: two</Thread>
</Parallel>
done
</think>
3"""
