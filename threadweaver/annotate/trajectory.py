"""One trajectory through steps 1 to 4, each with a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from threadweaver.annotate.conversation import TRIES, agree
from threadweaver.annotate.cut import Block, Segment, cut, marked_up, plain
from threadweaver.annotate.failures import Breach, LeftOut
from threadweaver.annotate.grammar import independent_grammar, map_grammar, outline_grammar
from threadweaver.annotate.independent import read_independent
from threadweaver.annotate.lines import Response, numbered
from threadweaver.annotate.map import Range, read_map
from threadweaver.annotate.outline import read_outlines
from threadweaver.annotate.prompts import Prompts
from threadweaver.annotate.store import Ask, Store, write_json


class Trajectory:
    """A sequential response that is to become parallel.

    Args:
        number: of its problem, counted from 1.
        source: where that comes from.
        problem: its text.
        ask: asks the teacher, for each step that does.
    """

    def __init__(
        self,
        number: int,
        source: str,
        problem: str,
        response: Response,
        store: Store,
        prompts: Prompts,
        ask: Mapping[str, Ask],
    ):
        self._number, self._source, self._problem = number, source, problem
        self._response, self._store, self._prompts, self._ask = response, store, prompts, ask

    async def parallel(self) -> str:
        """The response with its blocks.

        Raises:
            LeftOut: nothing of it can be made parallel.
            NoReply, Refused, ValueError: from the teacher.
        """
        groups = await self._map()
        segments = self._cut(groups)
        await self._make_independent(segments)
        segments = await self._outline(segments)
        return self._response.before + marked_up(segments) + self._response.after

    async def _map(self) -> list[list[Range]]:
        """Step 1: the lines of each unit of each group."""
        lines = self._response.lines
        log = self._log("1-map", lines=numbered(lines))
        prompt = map_prompt(self._prompts, self._problem, lines)
        try:
            found = await agree(
                log,
                self._prompts,
                prompt,
                map_grammar(len(lines)),
                lambda reply: read_map(reply, len(lines)),
            )
        except Breach as breach:
            log.finish(left_out=str(breach))
            raise LeftOut("1-map", f"no map in {TRIES} tries", str(breach)) from breach
        steps = [[step.name, *step.lines, step.kind, step.text] for step in found.steps]
        log.finish(steps=steps, groups=found.ranges)
        if not found.groups:
            raise LeftOut("1-map", "its map has no parallel group")
        return found.ranges

    def _cut(self, groups: list[list[Range]]) -> list[Segment]:
        """Step 2."""
        segments, dropped = cut(self._response.lines, groups)
        record: dict[str, Any] = {"source": self._source, "given": groups}
        record["segments"] = [s if isinstance(s, str) else s.threads for s in segments]
        record["left_out"] = [{"group": d.ranges, "why": d.reason} for d in dropped]
        write_json(self._store.path("2-cut", self._number), record)
        if len(dropped) == len(groups):
            raise LeftOut("2-cut", "no group can be cut", dropped[0].reason)
        return segments

    async def _make_independent(self, segments: list[Segment]) -> None:
        """Step 3, in place: every thread but the first of its block."""
        log = self._log("3-independent", threads=_threads(segments))
        unchanged = []
        for number, (i, block) in enumerate(_blocks(segments), 1):
            before = _before(segments[:i])
            for n in range(1, len(block.threads)):
                thread = block.threads[n]
                prompt = self._prompts.fill(
                    "independent",
                    problem=self._problem,
                    before=before,
                    forbidden=parts(block.threads[:n]),
                    thread=thread.strip(),
                )
                try:
                    block.threads[n] = await agree(
                        log,
                        self._prompts,
                        prompt,
                        independent_grammar(),
                        lambda reply, thread=thread: read_independent(reply, thread),
                    )
                except Breach as breach:
                    unchanged.append({"block": number, "thread": n + 1, "why": str(breach)})
        log.finish(result=_threads(segments), unchanged=unchanged)

    async def _outline(self, segments: list[Segment]) -> list[Segment]:
        """Step 4: blocks get outlines, or are dissolved into their lines."""
        log = self._log("4-outline", threads=_threads(segments))
        result: list[Segment] = [*segments]
        dissolved = []
        for number, (i, block) in enumerate(_blocks(segments), 1):
            before, threads = _before(segments[:i]), block.threads
            prompt = self._prompts.fill(
                "outline",
                problem=self._problem,
                before=before,
                threads=parts(threads),
                count=len(threads),
            )
            known = f"{self._problem}\n{before}"
            try:
                block.outlines = await agree(
                    log,
                    self._prompts,
                    prompt,
                    outline_grammar(len(threads)),
                    lambda reply, threads=threads, known=known: read_outlines(
                        reply, threads, known
                    ),
                )
            except Breach as breach:
                dissolved.append({"block": number, "why": str(breach)})
                result[i] = block.lines
        outlines = [block.outlines for _, block in _blocks(result)]
        log.finish(result=outlines, dissolved=dissolved)
        if not outlines:
            raise LeftOut("4-outline", "no block got outlines", dissolved[0]["why"])
        return result

    def _log(self, step: str, **given: Any):
        return self._store.log(
            step, self._number, {"source": self._source, "given": given}, self._ask[step]
        )


def map_prompt(prompts: Prompts, problem: str, lines: list[str]) -> str:
    return prompts.fill("map", problem=problem, lines=numbered(lines), last_line=len(lines))


def parts(threads: list[str]) -> str:
    """Threads as the teacher sees them."""
    return "\n\n".join(f"Part {n}:\n{thread.strip()}" for n, thread in enumerate(threads, 1))


def _before(segments: list[Segment]) -> str:
    """The text before a block, as the teacher sees it."""
    return plain(segments).strip() or "(nothing but the problem)"


def _blocks(segments: list[Segment]) -> list[tuple[int, Block]]:
    return [(i, s) for i, s in enumerate(segments) if isinstance(s, Block)]


def _threads(segments: list[Segment]) -> list[list[str]]:
    return [list(block.threads) for _, block in _blocks(segments)]
