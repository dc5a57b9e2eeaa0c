"""`python -m threadweaver.eval --model MODEL --task NAME --n N [--mode both] ...`

Solves held-out problems of a task and prints every metric of docs/semantics.md, "Path metrics",
with 95 % confidence intervals: Wilson's for shares, by bootstrap over problems for means and
ratios. With --mode both, also the gain over decoding one token after another. --json writes the
figures to a file, --responses every response with its grade; files that exist are overwritten.
Progress goes to stderr.

Prompts are the user's turn of the tokenizer's chat template, if it has one; with --template.use
none they are taken as they stand.

Exit codes: 0; 2 for arguments, a task or a model that cannot be used, with one line on stderr; 1
for anything unexpected, logits that are not finite among it; 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentError
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from threadweaver.command import command, explain, fail, is_writable, quiet, train_extra

with train_extra():
    from jsonargparse import ArgumentParser
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from threadweaver.evaluate.grade import graded_row
    from threadweaver.generate.options import (
        add_options,
        engine_settings,
        generation_settings,
        template_config,
    )
    from threadweaver.generate.settings import MOST_RESPONSES
    from threadweaver.generate.weaver import Mode
    from threadweaver.output import Output
    from threadweaver.progress import has_no_reader, print_line
    from threadweaver.tasks import load_task, task_names

if TYPE_CHECKING:
    from threadweaver.evaluate.intervals import Estimate
    from threadweaver.evaluate.metrics import Comparison, Evaluation

MODES: dict[str, list[Mode]] = {
    "parallel": ["parallel"],
    "sequential": ["sequential"],
    "both": ["sequential", "parallel"],
}


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        modes = MODES[options.mode]
        generation = generation_settings(options, modes[0])
        _check(options)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.evaluate.metrics import compare
    from threadweaver.evaluate.modes import evaluate_modes
    from threadweaver.evaluate.rollouts import fitting, queue
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.generate.load import check_chat, load_engine, settle_precision

    quiet()
    # The files are written also if nobody reads what is shown.
    console = Console(file=cast(IO[str], Output(sys.stdout)))
    try:
        task = load_task(options.task, **options.task_options or {})
        problems = task.problems("validation", options.n, options.seed)
        engine_options, precision_note = settle_precision(engine_settings(options))
        for note in filter(None, (*getattr(task, "notes", ()), precision_note)):
            print_line(console, note)
        engine, tokenizer = load_engine(
            options.model,
            engine_options,
            parallel="parallel" in modes,
            template=template_config(options),
        )
        check_chat(options.chat, tokenizer)
        problems, skipped, notes = fitting(engine, problems, generation)
        for note in notes:
            print_line(console, note)
        # A warm-up that is not timed: the first step takes the memory of the KV pages.
        queue(engine, problems[:1], replace(generation, max_tokens=min(8, generation.max_tokens)))
        engine.run()
        evaluations = evaluate_modes(
            modes,
            engine,
            task,
            problems,
            generation,
            Console(file=cast(IO[str], Output(sys.stderr))),
            samples=options.samples,
            seed=options.seed,
            at_once=options.at_once,
        )
    except ValueError as error:
        return fail(error, 2)
    except NonFiniteLogits as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing is saved", 130)
    gain = compare(**evaluations) if options.mode == "both" else None
    print_table(console, f"{options.task}, {len(problems)} problems", evaluations, gain)
    files: dict[Path, Iterable[str]] = {}
    if options.json:
        record = {
            **{name: options[name] for name in ("model", "task", "task_options", "seed", "chat")},
            "template": asdict(template_config(options)),
            "engine": asdict(engine_options),
            "precision": precision_note,
            "skipped_prompts": skipped,
            **{mode: evaluation.as_dict() for mode, evaluation in evaluations.items()},
            "comparison": asdict(gain) if gain else None,
        }
        files[options.json] = [json.dumps(record, indent=2) + "\n"]
    if options.responses:
        files[options.responses] = (
            json.dumps(row, ensure_ascii=False) + "\n"
            for mode, evaluation in evaluations.items()
            for row in _rows(mode, evaluation)
        )
    code = 0
    for path, lines in files.items():
        try:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            code = fail(OSError(error.errno, error.strerror, str(path)), 1)
    return code or (128 + signal.SIGPIPE if has_no_reader(console) else 0)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m threadweaver.eval",
        description="Solve held-out problems of a task and report every metric.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--task",
        type=str,
        required=True,
        help=f"One of {task_names()}.",
    )
    parser.add_argument(
        "--task_options",
        type=dict[str, Any] | None,
        help="Its options, such as '{digits: 3}'; of a data file, '{held_out: 1}' takes every row.",
    )
    parser.add_argument(
        "--n", type=int | None, help="How many problems; null: all that are held out."
    )
    parser.add_argument("--samples", type=int, default=1, help="Responses to each problem.")
    parser.add_argument(
        "--at_once",
        type=int | None,
        help="Problems decoded at the same time; 1 measures what one user waits for. Default: all.",
    )
    parser.add_argument(
        "--mode",
        choices=list(MODES),
        default="parallel",
        help="parallel: threads are decoded at the same time; sequential: one token after another.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the problems and of the draws.")
    parser.add_argument("--json", type=Path, help="File for all figures; overwritten.")
    parser.add_argument(
        "--responses", type=Path, help="File for all responses, as JSON lines; overwritten."
    )
    add_options(parser)
    return parser


def _check(options) -> None:
    """Raises ValueError for numbers out of range and files that could not be written at the end."""
    for name in ("n", "samples", "at_once"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name} is {options[name]}: it must be at least 1")
    for name in ("json", "responses"):
        path = options[name]
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"{name}: {path.parent}: no such folder; make it, or name another")
        if not is_writable(path):
            raise ValueError(f"{name}: {path} cannot be written: not allowed, or read-only")
    if options.json and options.json == options.responses:
        raise ValueError(f"responses: {options.responses} is the file of --json; name another")
    at_once = (options.at_once or options.n or 1) * options.samples
    if at_once > MOST_RESPONSES:
        raise ValueError(
            f"n, samples: {at_once:,} responses at once; at most {MOST_RESPONSES:,} can be decoded "
            "together (--at_once)"
        )


def _rows(mode: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for i, graded in enumerate(evaluation.graded):
        row = graded_row(graded)
        asked = {"prompt": row.pop("question"), "answer": row.pop("ground_truth")}
        rows.append({"mode": mode, "sample": i % evaluation.samples, **asked, **row})
    return rows


def print_table(
    console: Console,
    title: str,
    evaluations: dict[Mode, Evaluation],
    comparison: Comparison | None,
) -> None:
    """Prints a row for each metric and a column for each mode; below them the comparison."""
    table = Table(title=Text(title), title_justify="left")  # a path may look like markup
    table.add_column("")
    for mode in evaluations:
        table.add_column(mode, justify="right")
    metrics = {mode: evaluation.metrics() for mode, evaluation in evaluations.items()}
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    for name in names:
        cells = (_cell(name, found.get(name)) for found in metrics.values())
        table.add_row(name.replace("_", " "), *cells)
    for name, cell in (
        ("max speedup", lambda e: f"{e.max_speedup:.2f}x" if e.max_speedup else ""),
        ("ended by a limit", lambda e: f"{sum(e.limits.values()):,}"),
        ("no answer", lambda e: f"{e.no_answer:,}"),
        ("not graded", lambda e: f"{e.ungraded:,}"),
        ("wall-clock", lambda e: f"{e.seconds:,.1f} s"),
        ("tokens per second", lambda e: f"{e.tokens_per_second:,.0f}"),
    ):
        table.add_row(name, *map(cell, evaluations.values()))
    console.print(table)
    if comparison:
        most = f", at most {comparison.max_speedup:.2f}x" if comparison.max_speedup else ""
        difference = comparison.accuracy_difference
        console.print(
            f"parallel over sequential: {_cell('speedup', comparison.speedup)} in token "
            f"latency{most}; {comparison.wall_clock_speedup:.2f}x in wall-clock; accuracy "
            f"{100 * difference.value:+.1f} points "
            f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]",
            highlight=False,
        )


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if name in _SHARES or name.startswith("pass@"):
        return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    digits, unit = (2, "x") if name == "speedup" else (1, "")
    low, high = f"{estimate.low:,.{digits}f}", f"{estimate.high:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{unit} [{low}, {high}]"


_SHARES = ("accuracy", "format", "activation", "acceleration", "redundancy")


if __name__ == "__main__":
    sys.exit(main())
