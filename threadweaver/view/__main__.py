"""`python -m threadweaver.view trajectory|trie|run ... --out PAGE.html`: pages to look at.

Each is one HTML file, light and dark, that loads nothing from anywhere. A page that was written
before is overwritten; anything else only after a question, or with --overwrite.

    trajectory FILE          trajectories of a data file, of `evaluate --responses`, or of
                             self-training's rollouts, their threads side by side
    trie FILE --row N        the trie of one of them, with its mask and the schedule's blocks
    run DIR                  the curves, stages, rejects and samples of a run

Exit codes: 0; 2 for arguments or files that cannot be used, with one line on stderr; 1 for a page
that cannot be written; 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from threadweaver.command import (
    command,
    expand_home,
    explain,
    fail,
    quiet,
    refuse_ranks,
    train_extra,
)

with train_extra():
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from threadweaver.progress import Progress, print_line
    from threadweaver.view.page import check_out
    from threadweaver.whole_file import write_whole

if TYPE_CHECKING:
    from threadweaver.trajectory import Codec


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    refuse_ranks()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, pages = _parsers()
    known = pages.get(arguments[0], parser) if arguments else parser
    try:
        given = parser.parse_args(arguments)
        options = given[given.subcommand]
        expand_home(options, ("dir", "file", "model", "out"))
        _check(given.subcommand, options)
        check_out(options.out, options.overwrite)
        {"trajectory": _trajectory, "trie": _trie, "run": _run}[given.subcommand](options)
    except ArgumentError as error:
        return fail(explain(str(error), known.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    print(options.out)
    return 0


def _trajectory(options: Namespace) -> None:
    from threadweaver.view.rows import read_trajectories
    from threadweaver.view.trajectory import trajectory_page

    codec = _codec(options.model) if options.model else None
    rows = list(read_trajectories(options.file))
    with Progress(Console(stderr=True), "reading", len(rows), "rows") as progress:
        text = trajectory_page(
            rows, options.file, codec, max_depth=options.max_depth, on_row=progress.update
        )
    write_whole(options.out, text)


def _trie(options: Namespace) -> None:
    from threadweaver.view.rows import read_trajectories
    from threadweaver.view.trie import trie_of, trie_page

    row = next(islice(read_trajectories(options.file), options.row - 1, None), None)
    if row is None:
        rows = sum(1 for _ in read_trajectories(options.file))
        raise ValueError(f"row is {options.row}: {options.file} has {rows} (they count from 1)")
    codec = _codec(options.model)
    text = trie_page(
        trie_of(row, codec, options.max_depth),
        lambda id: codec.decode([id]),
        f"{Path(options.file).name}, row {options.row}",
        block_q=options.block_q,
        block_kv=options.block_kv,
    )
    write_whole(options.out, text)


def _run(options: Namespace) -> None:
    from threadweaver.view.run import check_run, run_page, watch

    folder = Path(options.dir)
    check_run(folder)
    if options.watch is None:
        write_whole(options.out, run_page(folder))
        return
    console = Console(stderr=True)
    print_line(console, f"{options.out}: written every {options.watch:g} s; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        watch(folder, options.out, options.watch)


def _codec(model: str) -> Codec:
    """Of a model's tokenizer."""
    from threadweaver.model import load_tokenizer
    from threadweaver.trajectory import Codec

    quiet()
    return Codec.from_tokenizer(load_tokenizer(model))


def _check(page: str, options: Namespace) -> None:
    """Raises ValueError for numbers out of range."""
    least = {"trajectory": ("max_depth",), "trie": ("row", "max_depth", "block_q", "block_kv")}
    for name in least.get(page, ()):
        if options[name] < 1:
            raise ValueError(f"{name} is {options[name]}: it must be at least 1")
    seconds = options.get("watch")
    if seconds is not None and not 0.1 <= seconds <= 86400:
        raise ValueError(f"watch is {seconds:g}: it must be 0.1 to 86,400 seconds")


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Of the command, and of each page."""
    parser = ArgumentParser(
        prog="python -m threadweaver.view",
        description="Write a page to look at.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, metavar="trajectory|trie|run")
    pages = {}
    of_rows = "Data file, responses of an evaluation, rollouts of self-training; or a folder."
    for name, shows in (
        ("trajectory", "Rows of trajectories, threads side by side."),
        ("trie", "The trie of one row, its mask and schedule."),
        ("run", "Curves, stages, rejects and samples of a run."),
    ):
        page = ArgumentParser(description=shows, exit_on_error=False, allow_abbrev=False)
        if name == "run":
            page.add_argument("dir", type=str, help="Its run_dir.")
            page.add_argument(
                "--watch",
                type=float | None,
                help="Write the page anew every so many seconds while the run lasts.",
            )
        else:
            page.add_argument("file", type=str, help=of_rows)
            page.add_argument(
                "--max_depth", type=int, default=1, help="How deep blocks nest in the file."
            )
        if name == "trajectory":
            page.add_argument(
                "--model", type=str | None, help="For lengths in tokens of its tokenizer."
            )
        elif name == "trie":
            page.add_argument("--row", type=int, default=1, help="Which row; they count from 1.")
            page.add_argument(
                "--model", type=str, required=True, help="Whose tokenizer: a folder, or smollm2."
            )
            page.add_argument("--block_q", type=int, default=128, help="Query rows of a block.")
            page.add_argument("--block_kv", type=int, default=128, help="KV columns of a block.")
        page.add_argument("--out", type=Path, required=True, help="The page, an HTML file.")
        page.add_argument(
            "--overwrite", action="store_true", help="Overwrite any file without a question."
        )
        commands.add_subcommand(name, page, help=shows)
        pages[name] = page
    return parser, pages


if __name__ == "__main__":
    sys.exit(main())
