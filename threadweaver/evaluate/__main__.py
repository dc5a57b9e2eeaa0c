"""`python -m threadweaver.eval --model MODEL --task NAME --n N [--mode both] ...`

Solves held-out problems of a task and prints every metric of docs/semantics.md, "Path metrics",
with 95 % confidence intervals: Wilson's for shares, by bootstrap over problems for means and
ratios. With --mode both, also the gain over decoding one token after another. --json writes the
figures to a file, --responses every response with its grade. Progress goes to stderr.

With one of these files, responses are kept as they come, beside it in FILE.partial: a command that
was stopped or killed goes on from there when it is given again, with the same settings. Files that
are there already are overwritten with --overwrite alone.

--server URL has another engine decode, request by request.

torchrun --nproc_per_node N -m threadweaver.eval ... --problems N has N processes share out the
problems, each with an engine of its own; the first reads and writes the files. (--problems is --n,
which torchrun takes for one of its own options.)

Prompts are the user's turn of the tokenizer's chat template, if it has one; with --template.use
none they are taken as they stand.

Exit codes: 0; 2 for arguments, a task, a model or a server that cannot be used, with one line on
stderr; 1 for anything unexpected, logits that are not finite or a server that fails among it; 130
when stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from threadweaver.command import (
    check_overwrite,
    command,
    expand_home,
    explain,
    fail,
    quiet,
    train_extra,
)

with train_extra():
    from jsonargparse import Namespace
    from rich.console import Console

    from threadweaver.evaluate.grade import graded_row
    from threadweaver.evaluate.options import (
        FILES,
        MODES,
        PATHS,
        build_parser,
        check,
        server_settings,
    )
    from threadweaver.generate.options import (
        engine_settings,
        generation_settings,
        template_config,
    )
    from threadweaver.generate.response_log import ResponseLog, partial_of
    from threadweaver.generate.server.address import ServerError
    from threadweaver.output import Output
    from threadweaver.progress import has_no_reader, print_line
    from threadweaver.tasks import load_task
    from threadweaver.whole_file import write_whole

if TYPE_CHECKING:
    from threadweaver.evaluate.metrics import Evaluation

SECONDS_FOR_FIRST = 2.0  # that the first rank has to say what it keeps, when all are interrupted


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _main(arguments)
    from threadweaver.rank_errors import joined

    with joined():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
        expand_home(options, PATHS)
        if int(os.environ.get("RANK", "0")) > 0:
            for name in FILES:
                options[name] = None
        modes = MODES[options.mode]
        generation = generation_settings(options, modes[0])
        check(options)
        server = server_settings(options)
        kept = _kept_in(options)
        files = [options[name] for name in FILES if options[name]]
        if kept is not None and partial_of(kept).exists():
            files.remove(kept)  # it was asked about when the responses were begun
        check_overwrite(filter(Path.is_file, files), options.overwrite)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver import ranks
    from threadweaver.data.overlap import find_overlap, texts_of_files
    from threadweaver.device import find_device
    from threadweaver.evaluate.metrics import compare
    from threadweaver.evaluate.modes import evaluate_modes
    from threadweaver.evaluate.rollouts import fingerprint, fitting, queue, texts_of_problems
    from threadweaver.evaluate.table import print_table
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.generate.load import check_chat, load_engine, load_server, settle_precision

    quiet()
    # The files are written also if nobody reads what is shown.
    console = Console(file=cast(IO[str], Output(sys.stdout)))
    log: ResponseLog | None = None
    try:
        task = load_task(options.task, **options.task_options or {})
        samples = options.samples or getattr(task, "samples", 1)
        problems = task.problems("validation", options.n, options.seed)
        for note in getattr(task, "notes", ()):
            print_line(console, note)
        overlap = None
        if options.overlap:
            overlap = find_overlap(texts_of_problems(problems), texts_of_files(options.overlap))
            for line in overlap.lines():
                print_line(console, line)
        engine_options, template = engine_settings(options), template_config(options)
        parallel = "parallel" in modes
        if server is not None:
            engine, tokenizer, note = load_server(
                options.model, server, engine_options, parallel, template
            )
            weights: dict[str, Any] = {"server_model": server.model}
        else:
            if ranks.size() > 1 and find_device(engine_options.device).type == "cuda":
                ranks.take_gpu()
            engine_options, note = settle_precision(engine_options)
            engine, tokenizer = load_engine(
                options.model, engine_options, parallel=parallel, template=template
            )
            weights = {"weights": engine.fingerprint(), "precision": engine_options.precision}
            if engine.pool_note:
                print_line(console, engine.pool_note)
        if note:
            print_line(console, note)
        check_chat(options.chat, tokenizer)
        problems, skipped, notes = fitting(engine, problems, generation)
        for line in notes:
            print_line(console, line)
        settings = {
            **{name: options[name] for name in ("model", "task", "task_options", "seed")},
            "samples": samples,
            "problems": fingerprint(problems),
            "generation": asdict(replace(generation, mode="parallel")),
            "template": asdict(template),
            **weights,
        }
        _check_ranks({**settings, "mode": options.mode, "at_once": options.at_once})
        if kept is not None:
            log = ResponseLog(kept, settings, restart=options.overwrite)
            if log.rows:
                print_line(console, f"{log.path}: {len(log.rows):,} responses are there already")
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
            samples=samples,
            seed=options.seed,
            at_once=options.at_once,
            log=log,
        )
    except ValueError as error:
        return _ended(error, log, 2)
    except (ServerError, NonFiniteLogits) as error:
        return _ended(error, log, 1)
    except KeyboardInterrupt:
        if not ranks.is_first():
            time.sleep(SECONDS_FOR_FIRST)
        return _ended("interrupted", log, 130)
    gain = compare(**evaluations) if options.mode == "both" else None
    print_table(console, f"{options.task}, {len(problems)} problems", evaluations, gain)
    record = {
        **{name: options[name] for name in ("model", "task", "task_options", "seed", "chat")},
        "template": asdict(template),
        "engine": asdict(engine_options),
        "server": asdict(server) if server else None,
        "precision": None if server else note,
        "skipped_prompts": skipped,
        "overlap": overlap.as_dict() if overlap else None,
        **{mode: evaluation.as_dict() for mode, evaluation in evaluations.items()},
        "comparison": asdict(gain) if gain else None,
    }
    # The file of few lines comes last: if this process is killed between them, it is not there yet,
    # and the same command goes on without a question.
    written: dict[Path, Iterable[str]] = {}
    if options.responses:
        written[options.responses] = (
            json.dumps(row, ensure_ascii=False) + "\n"
            for mode, evaluation in evaluations.items()
            for row in _rows(mode, evaluation)
        )
    if options.json:
        written[options.json] = [json.dumps(record, indent=2) + "\n"]
    code = 0
    for path, lines in written.items():
        try:
            _write(path, lines)
        except OSError as error:
            code = fail(OSError(error.errno, error.strerror, str(path)), 1)
    if log is not None:
        log.close(remove=code == 0)
    return code or (128 + signal.SIGPIPE if has_no_reader(console) else 0)


def _check_ranks(settings: dict[str, Any]) -> None:
    """Raises ValueError if other ranks have other settings, problems or weights than the first."""
    from threadweaver import ranks
    from threadweaver.generate.response_log import difference

    first, *others = ranks.gather(settings)
    for rank, theirs in enumerate(others, 1):
        if differing := difference(theirs, first):
            raise ValueError(f"rank {rank} has {differing} as rank 0: start all ranks alike")


def _kept_in(options: Namespace) -> Path | None:
    """The file beside which responses are kept; None if there is none, or it is a device."""
    files = [options[name] for name in reversed(FILES) if options[name]]
    return next((path for path in files if path.is_file() or not path.exists()), None)


def _ended(reason: Exception | str, log: ResponseLog | None, code: int) -> int:
    """Says why it ended, and what becomes of the responses; returns the exit code."""
    if log is not None and log.rows:
        reason = f"{reason}; {len(log.rows):,} responses are kept: give the same command to go on"
    elif reason == "interrupted":
        reason = "interrupted; nothing is saved (--responses FILE keeps what is decoded)"
    if log is not None:
        log.close(remove=not log.rows)
    return fail(reason, code)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Writes a file whole or not at all, unless it is a device."""
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        return
    write_whole(path, lines)


def _rows(mode: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for i, graded in enumerate(evaluation.graded):
        row = graded_row(graded)
        asked = {"prompt": row.pop("question"), "answer": row.pop("ground_truth")}
        timed = {"seconds": graded.counts.seconds}
        rows.append({"mode": mode, "sample": i % evaluation.samples, **asked, **row, **timed})
    return rows


if __name__ == "__main__":
    sys.exit(main())
