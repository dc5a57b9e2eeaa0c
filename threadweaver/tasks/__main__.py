"""`python -m threadweaver.tasks multiplication|write --out DIR`: write a task's data.

Writes DIR/train and DIR/validation as JSON lines or parquet, in the columns of `threadweaver.data`.
`--help` names the tasks there are, those of installed packages included.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from threadweaver.command import (
    check_overwrite,
    command,
    expand_home,
    fail,
    is_writable,
    refuse_ranks,
    train_extra,
)

with train_extra():
    from jsonargparse import ArgumentParser, auto_cli
    from rich.console import Console

    from threadweaver.data import save_rows, trajectory_row
    from threadweaver.progress import Progress, print_line
    from threadweaver.tasks import Problem, Task, load_task, task_names
    from threadweaver.tasks.multiplication import make_rows, split_problems


def multiplication(
    out: Path,
    train: int = 7000,
    validation: int = 500,
    digits: int = 2,
    factors: int = 2,
    parallel_share: float = 1.0,
    seed: int = 0,
    format: Literal["jsonl", "parquet"] = "jsonl",
    overwrite: bool = False,
) -> None:
    """Write DIR/train and DIR/validation: different products, worked step by step.

    Args:
        out: folder to write to.
        train: number of training rows, each another problem.
        validation: number of validation rows; no problem of training, in any order of its factors.
        digits: digits of each factor.
        factors: factors of each product.
        parallel_share: share of the rows with parallel blocks; the others are sequential.
        seed: same seed, same files; the problems do not depend on the share.
        format: jsonl (JSON lines) or parquet.
        overwrite: write over files that are there already, without being asked.
    """
    _check_counts(train, validation)
    _check_out(out, format, overwrite)
    halves = split_problems(train, validation, digits, factors, seed)
    rows = ((len(problems), make_rows(problems, parallel_share, seed)) for problems in halves)
    _save(out, format, dict(zip(("train", "validation"), rows, strict=True)))


def write(
    task: str,
    out: Path,
    train: int = 1000,
    validation: int = 200,
    options: dict[str, Any] | None = None,
    parallel: bool = True,
    seed: int = 0,
    format: Literal["jsonl", "parquet"] = "jsonl",
    overwrite: bool = False,
) -> None:
    """Write DIR/train and DIR/validation: problems of any task, with demonstrations if it has them.

    A file keeps the right answer of each problem, not the task's own scorer: read as a task, it is
    graded as mathematics.

    Args:
        task: its name, or the path of a data file.
        out: folder to write to.
        train: number of training rows.
        validation: number of validation rows; no question of training.
        options: of the task: --options.NAME VALUE.
        parallel: whether demonstrations have parallel blocks.
        seed: same seed, same files.
        format: jsonl (JSON lines) or parquet.
        overwrite: write over files that are there already, without being asked.
    """
    _check_counts(train, validation)
    _check_out(out, format, overwrite)
    source = load_task(task, **(options or {}))
    for note in getattr(source, "notes", ()):
        print_line(Console(stderr=True), note)
    halves = {
        "train": source.problems("train", train, seed),
        "validation": source.problems("validation", validation, seed),
    }
    rows = {name: (len(half), _rows(source, half, parallel)) for name, half in halves.items()}
    _save(out, format, rows)


def _check_counts(train: int, validation: int) -> None:
    """Raises ValueError for a file without rows, which no command reads."""
    for name, count in (("train", train), ("validation", validation)):
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")


def _check_out(out: Path, format: str, overwrite: bool) -> None:
    """Raises ValueError for files that cannot be written, or must not be."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; name a folder")
    if not is_writable(out):
        raise ValueError(f"out: {out} cannot be written; name another folder")
    check_overwrite((out / f"{half}.{format}" for half in ("train", "validation")), overwrite)


def _rows(task: Task, problems: Sequence[Problem], parallel: bool) -> Iterator[dict[str, Any]]:
    for problem in problems:
        if not problem.answer:
            raise ValueError(
                f"{problem.source}: no right answer is on record, so that its row could not be "
                "graded; use the task itself instead of a file of it"
            )
        response = task.demonstration(problem, parallel)
        yield trajectory_row(problem.prompt, response, problem.answer)


def _save(out: Path, format: str, files: dict[str, tuple[int, Iterator[dict[str, Any]]]]) -> None:
    """Makes the rows of all files, of which the number is known, and then writes them."""
    console, made = Console(stderr=True), {}
    for name, (count, rows) in files.items():
        with Progress(console, f"{name}.{format}", count, "rows") as progress:
            made[out / f"{name}.{format}"] = list(progress.track(rows))
    for path, rows in made.items():
        save_rows(rows, path)
        print_line(console, f"{path}: {len(rows)} rows")


class _DashParser(ArgumentParser):
    """Takes options of several words with dashes or underscores, and no abbreviations."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings, allow_abbrev=False)

    def parse_args(self, *arguments, **settings):
        options = super().parse_args(*arguments, **settings)
        names = ("multiplication.out", "write.out", "write.task", "write.options.path")
        expand_home(options, names)
        return options

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(fail(message, 2))

    def add_argument(self, *names, **settings):
        if names == ("--overwrite",):
            settings |= {"nargs": "?", "const": True}  # a flag
        dashed = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *dashed, **settings)


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own). Exit codes: 0; 2 for arguments that cannot
    be met, with one line on stderr; 1 for files that cannot be written."""
    refuse_ranks()
    commands = {"multiplication": multiplication, "write": write}
    try:
        auto_cli(
            commands,
            args=arguments,
            as_positional=False,
            parser_class=_DashParser,
            description=f"Write the data of a task. Tasks: {task_names()}.",
        )
    except ValueError as error:
        return fail(error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
