"""Views of generations while they decode: live on a terminal, else plain text or a count.

All are used alike:

    with LiveView(generations, codec, console) as view:
        engine.run(view.update)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from threadweaver.generate.engine import Engine, Generation, Token
from threadweaver.generate.transcript import Piece, pieces, settled, transcript
from threadweaver.generate.weaver import RequestId
from threadweaver.output import visible
from threadweaver.progress import ResponsesProgress
from threadweaver.trajectory import Codec

FRAME_SECONDS = 0.1
# Narrower panels are not readable.
MIN_THREAD_WIDTH = 26
MIN_THREAD_HEIGHT = 4


class PlainView:
    """Text for a file or a pipe: a single response as it grows in its final order, several
    responses each when it is done.

    On exit all that was decoded is written.
    """

    def __init__(self, generations: Sequence[Generation], codec: Codec, file: TextIO):
        self._generations = generations
        self._codec = codec
        self._file = file
        self._unwritten = list(enumerate(generations, 1))
        self._count = 0  # ids of the single response that are written
        self._known = 0  # of these, those that the next ones are decoded without
        self._limit = generations[0].weaver.requests()[0].max_tokens
        self._due = 0.0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc) -> None:
        if len(self._generations) == 1:
            self._write_on(transcript(self._generations[0], self._codec))
            self._file.write("\n")
        else:
            self._write_responses(list(self._unwritten))
        self._file.flush()

    def update(self, tokens: list[Token]) -> None:
        if time.monotonic() < self._due:
            return
        if len(self._generations) == 1:
            ids = settled(self._generations[0], self._codec)[: self._limit]
            self._write_on(self._whole_characters(ids))
        else:
            self._write_responses([g for g in self._unwritten if g[1].weaver.done])
        self._file.flush()
        self._due = time.monotonic() + FRAME_SECONDS

    def _write_on(self, ids: list[int]) -> None:
        """Writes what the ids after those that are written add to the text. They are decoded behind
        the last of these, since some tokenizers leave out a space at the start of a text."""
        written = self._codec.decode(ids[self._known : self._count])
        text = self._codec.decode(ids[self._known :])
        self._file.write(text[len(written) :])
        if len(text) > len(written):
            self._known, self._count = self._count, len(ids)

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """The ids without the last few, three at most, if these are only a part of a character."""
        for end in range(len(ids), max(self._count, len(ids) - 4), -1):
            if not self._codec.decode(ids[self._known : end]).endswith("\ufffd"):
                return ids[:end]
        return ids[: self._count] if len(ids) - self._count <= 3 else ids

    def _write_responses(self, responses: list[tuple[int, Generation]]) -> None:
        for number, generation in responses:
            state = "" if generation.weaver.done else ", interrupted"
            self._file.write(f"--- response {number} of {len(self._generations)}{state} ---\n")
            text = self._codec.decode(transcript(generation, self._codec))
            self._file.write(f"{text}\n")
            self._unwritten.remove((number, generation))


class CountView:
    """How many responses are done."""

    def __init__(self, engine: Engine, count: int, console: Console):
        self._engine, self._count = engine, count
        self._progress = ResponsesProgress(console, "decoding", count, engine)

    def __enter__(self) -> CountView:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.__exit__(*exc)

    def update(self, tokens: list[Token]) -> None:
        self._progress.decoded(self._count - self._engine.unfinished)


class LiveView:
    """Threads side by side: the main line, below it a panel for each thread of the open block.

    Of several generations there is a row each, and of the first that is not done also its threads.
    On exit the view is removed and the responses are printed in full.
    """

    def __init__(self, generations: Sequence[Generation], codec: Codec, console: Console):
        self._generations = generations
        self._codec = codec
        self._console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._count = 0
        self._start = time.monotonic()
        self._due = 0.0

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        self._live.stop()
        for number, generation in enumerate(self._generations, 1):
            if len(self._generations) > 1:
                state = "" if generation.weaver.done else ", interrupted"
                self._console.rule(f"response {number}{state}", align="left", style="dim")
            text = Text(self._text(transcript(generation, self._codec)))
            self._console.print(text, soft_wrap=True)

    def update(self, tokens: list[Token]) -> None:
        self._count += len(tokens)
        now = time.monotonic()
        if now >= self._due:
            self._live.update(self._frame(now - self._start), refresh=True)
            self._due = time.monotonic() + FRAME_SECONDS

    def _frame(self, seconds: float) -> RenderableType:
        unfinished = [g for g in self._generations if not g.weaver.done]
        shown = unfinished[0] if unfinished else self._generations[-1]
        height = self._console.height - 1
        parts: list[RenderableType] = []
        if len(self._generations) > 1:
            rows = max(1, height // 3)
            parts.append(self._rows(unfinished or [shown], rows))
            height -= min(rows, len(unfinished or [shown]))
        parts += self._response(shown, height)
        threads = sum(len(g.open) for g in unfinished)
        done = len(self._generations) - len(unfinished)
        parts.append(
            Text(
                f"{done}/{len(self._generations)} done, {threads} running, {self._count:,} tokens, "
                f"{self._count / max(seconds, 1e-9):,.0f} tokens/s",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
        return Group(*parts)

    def _rows(self, generations: list[Generation], count: int) -> Table:
        """A row for each of the first `count` generations."""
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1)
        for generation in generations[:count]:
            tokens = len(transcript(generation, self._codec))
            running = len(generation.open)
            table.add_row(
                f"response {self._generations.index(generation) + 1}",
                f"{tokens:,} tokens",
                f"{running} threads" if running != 1 else "1 thread",
                ProgressBar(total=generation.settings.max_tokens, completed=tokens),
            )
        return table

    def _response(self, generation: Generation, height: int) -> list[RenderableType]:
        """The main line and the threads of its open block, in at most `height` lines."""
        codec = self._codec
        parts = pieces(generation, codec)
        main = generation.weaver.response
        if parts[-1].is_open and len(parts[-1].request) == 1:
            return [self._panel("main line", main + parts[-1].tokens, height)]
        fork = max((p.request[0] for p in parts if len(p.request) > 1), default=None)
        threads: dict[RequestId, list[Piece]] = {}
        for piece in parts:
            if len(piece.request) > 1 and piece.request[0] == fork:
                threads.setdefault(piece.request[:2], []).append(piece)
        if generation.weaver.done or not threads:
            return [self._panel("main line", main, height)]
        columns = min(len(threads), max(1, self._console.width // MIN_THREAD_WIDTH))
        rows = -(-len(threads) // columns)
        main_height = max(3, height // 3)
        rows = min(rows, max(1, (height - main_height) // MIN_THREAD_HEIGHT))
        each = (height - main_height) // rows
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._thread(line, each, columns) for line in threads.values()]
        for row in range(rows):
            grid.add_row(*panels[row * columns : (row + 1) * columns])
        return [self._panel("main line", main, main_height), grid]

    def _thread(self, line: list[Piece], height: int, columns: int) -> Panel:
        header = self._codec.decode(line[0].forced)
        number = header.rpartition("<Thread>")[2].strip(" :\n")
        ids = [*line[0].tokens, *(id for piece in line[1:] for id in piece.ids)]
        panel = self._panel(f"thread {number}", ids, height, columns)
        panel.height = height
        if not any(piece.is_open for piece in line):
            panel.border_style = "dim"
        return panel

    def _panel(self, title: str, ids: list[int], height: int, columns: int = 1) -> Panel:
        """The last lines of a text in a frame of at most `height` lines."""
        width = max(1, self._console.width // columns - 4)
        lines = max(1, height - 2)
        # A character has at most four tokens.
        text = self._text(ids[-4 * lines * width :])[-lines * width :]
        wrapped = Text(text, overflow="fold").wrap(self._console, width)[-lines:]
        return Panel(
            Text("\n").join(wrapped),
            title=f"{title}, {len(ids):,} tokens",
            title_align="left",
            border_style="cyan",
        )

    def _text(self, ids: list[int]) -> str:
        return visible(self._codec.decode(ids))
