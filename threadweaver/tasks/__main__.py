"""`python -m threadweaver.tasks multiplication --out DIR`: write a task's training data.

Writes DIR/train and DIR/validation as JSON lines or parquet, in the columns of `threadweaver.data`.
"""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, auto_cli
from rich.console import Console
from rich.progress import track

from threadweaver.data import save_rows
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
    """
    console = Console(stderr=True)
    halves = split_problems(train, validation, digits, factors, seed)
    for name, problems in zip(("train", "validation"), halves, strict=True):
        path = out / f"{name}.{format}"
        rows = make_rows(problems, parallel_share, seed)
        save_rows(list(track(rows, description=name, total=len(problems), console=console)), path)
        console.print(f"{path}: {len(problems)} rows", soft_wrap=True, highlight=False)


class _DashParser(ArgumentParser):
    """Options of several words are spelt with dashes on the command line, or as in the code."""

    def add_argument(self, *names, **settings):
        dashed = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *dashed, **settings)


def main() -> None:
    """Exit codes: 0; 2 for arguments that cannot be met, with one line on stderr."""
    try:
        auto_cli({"multiplication": multiplication}, as_positional=False, parser_class=_DashParser)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
