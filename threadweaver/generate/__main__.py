r"""`python -m threadweaver.generate --model MODEL --prompt TEXT [--n 8] [--mode sequential] ...`
`python -m threadweaver.generate --model MODEL --data FILE --out FILE [--n 8] ...`

Continues a prompt and shows the threads side by side as they decode, then what it took: tokens,
critical path, time. Without a terminal the text goes to stdout as it comes, a single response in
its final order, and the figures to stderr; with --json there is one JSON object on stdout. How
many of several responses are done, or of those for JSON, goes to stderr while they decode.

The prompt is the user's turn of the tokenizer's chat template; control tokens and tags in it are
text. Where the tokenizer has no template, or with --template.use none, the model gets it as it
stands, control tokens and tags included: nothing is stripped, and nothing added but, where there is
no template, what the tokenizer puts before any text (BOS), unless it is there. --escapes reads \n,
\t and \\ in it, so that --escapes --prompt '47*86=?\n' ends in a newline. An instruction is added
only with --template.instruction.

--data answers every row of a data file, in the columns that training reads. Its prompts are those
of training and evaluation, their instruction included. Responses are kept as they come, in
OUT.partial: a command that was stopped or killed goes on from there when it is given again, with
the same settings. Prompts that leave no room for a response are skipped and counted.

Exit codes: 0; 2 for arguments or a model that cannot be used, with one line on stderr; 1 for
anything unexpected, logits that are not finite among it; 130 when stopped by Ctrl-C, after what was
decoded so far has been shown.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import stat
import sys
import time
from argparse import ArgumentError
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from threadweaver.command import (
    check_overwrite,
    command,
    expand_home,
    explain,
    fail,
    is_writable,
    quiet,
    refuse_ranks,
    train_extra,
)

with train_extra():
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from threadweaver.data.files import data_files
    from threadweaver.generate.options import (
        add_options,
        engine_settings,
        generation_settings,
        template_config,
    )
    from threadweaver.generate.response_log import partial_of
    from threadweaver.generate.settings import MOST_RESPONSES, GenerationSettings
    from threadweaver.generate.weaver import Mode
    from threadweaver.progress import print_line


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    refuse_ranks()
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        expand_home(options, ("model", "prompt_file", "data", "out"))
        settings = generation_settings(options, options.mode)
        if options.data is None and options.out is None:
            prompt, template = _prompt(options), template_config(options)
            if template.instruction is None:
                # Who asks here says all that is asked.
                template = replace(template, instruction="")
        else:
            _check_files(options)
            return _answer(options, settings)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.generate.display import CountView, LiveView, PlainView
    from threadweaver.generate.engine import NonFiniteLogits, Token
    from threadweaver.generate.load import check_chat, load_engine, settle_precision
    from threadweaver.generate.outcome import Outcome
    from threadweaver.generate.sampler import stream_key
    from threadweaver.trajectory import Rendered

    quiet()
    try:
        engine_options, precision_note = settle_precision(engine_settings(options))
        engine, tokenizer = load_engine(
            options.model,
            engine_options,
            parallel=settings.mode == "parallel",
            template=template,
        )
        check_chat(options.chat, tokenizer)
        if not tokenizer.chat_template:
            # As it stands: what was begun can be continued, tags and all.
            prompt = Rendered(prompt)
        ids = engine.codec.encode_prompt(prompt)
        prompt = engine.codec.prompts.text(prompt)
        context_note = settings.context_note(engine.check(ids, settings), engine.context_length)
        generations = [
            engine.add(ids, settings, stream_key((options.seed, i))) for i in range(options.n)
        ]
    except ValueError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted before the first token", 130)
    console = Console(stderr=not sys.stdout.isatty())
    views: list[CountView | LiveView | PlainView]
    if options.json:
        views = [CountView(engine, options.n, Console(stderr=True))]
    elif sys.stdout.isatty():
        views = [LiveView(generations, engine.codec, console)]
    else:
        views = [PlainView(generations, engine.codec, sys.stdout)]
        if options.n > 1:
            # No bar: a pipe may bring the text to the same terminal, where it would be written on.
            views.append(CountView(engine, options.n, Console(stderr=True, force_terminal=False)))

    def show(tokens: list[Token]) -> None:
        for view in views:
            view.update(tokens)

    start, code = time.perf_counter(), 0
    try:
        with ExitStack() as stack:
            for view in views:
                stack.enter_context(view)
            engine.run(show)
    except KeyboardInterrupt:
        code = 130
    except NonFiniteLogits as error:
        return fail(error, 1)
    outcome = Outcome.of(engine, generations, time.perf_counter() - start)
    if options.json:
        asked = {"model": options.model, "prompt": prompt, "seed": options.seed}
        asked["precision"] = engine_options.precision
        print(json.dumps({**asked, "settings": asdict(settings), **asdict(outcome)}, indent=2))
    else:
        outcome.print(console)
        for note in filter(None, (context_note, precision_note)):
            print_line(console, note)
    return code


def _answer(options: Namespace, settings: GenerationSettings) -> int:
    """Answers a data file; the exit code. Raises ValueError for what cannot be used."""
    from threadweaver.data import DataError, columns_note, load_examples, save_rows
    from threadweaver.generate.answer_file import AnswerFile
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.generate.load import check_chat, load_engine, settle_precision
    from threadweaver.generate.response_log import ResponseLog

    quiet()
    console, log = Console(stderr=True), None
    try:
        examples = load_examples(options.data, responses=False)
        print_line(console, columns_note(options.data, examples))
        engine_options, precision_note = settle_precision(engine_settings(options))
        template = template_config(options)
        engine, tokenizer = load_engine(
            options.model, engine_options, parallel=settings.mode == "parallel", template=template
        )
        check_chat(options.chat, tokenizer)
        for note in filter(None, (precision_note, engine.pool_note)):
            print_line(console, note)
        answers = AnswerFile(examples, engine, settings, options.n, options.seed, console)
        log = ResponseLog(
            options.out,
            {
                **{name: options[name] for name in ("model", "data", "seed", "n")},
                "prompts": hashlib.sha256(json.dumps(answers.asked).encode()).hexdigest(),
                "generation": asdict(settings),
                "template": asdict(template),
                "weights": engine.fingerprint(),
                "precision": engine_options.precision,
            },
            restart=options.overwrite,
        )
        if log.rows:
            print_line(console, f"{log.path}: {len(log.rows):,} responses are there already")
        rows = answers.decode(log)
        try:
            save_rows(rows, options.out)
        except DataError as error:
            raise DataError(
                f"{error}. All responses are kept: rename {log.path} to NAME.jsonl.partial, and "
                "the same command with --out NAME.jsonl decodes none again"
            ) from error
        log.path.unlink()
    except KeyboardInterrupt:
        if log is None:
            return fail("interrupted before the first token", 130)
        kept = f"{len(log.rows):,} responses are kept: give the same command to go on"
        return fail(f"interrupted; {kept}", 130)
    except NonFiniteLogits as error:
        return fail(error, 1)
    finally:
        if log is not None:
            log.close(remove=False)
    print_line(console, f"{options.out}: {len(rows):,} responses")
    return 0


def _check_files(options: Namespace) -> None:
    """Raises ValueError for files of --data and --out that cannot be read, written or combined with
    the other options."""
    for name in ("data", "out"):
        if options[name] is None:
            raise ValueError(f"{name}: give --data and --out, one with the other")
    for name in ("prompt", "prompt_file"):
        if options[name] is not None:
            raise ValueError(f"{name}: give it, or --data, and not both")
    if options.json:
        raise ValueError("json: with --data everything is in the file of --out; leave it out")
    _check_n(options)
    out = options.out
    if out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"out: {out}: name it .jsonl or .parquet")
    if not out.parent.is_dir():
        raise ValueError(f"out: {out.parent}: no such folder; make it, or name another")
    if out.is_dir() or not is_writable(out):
        raise ValueError(f"out: {out} cannot be written; name another file")
    if out.exists() and any(out.samefile(file) for file in data_files(options.data)):
        raise ValueError(f"out: {out} is a file of --data; name another")
    if not partial_of(out).exists():
        check_overwrite([out], options.overwrite)


def _check_n(options: Namespace) -> None:
    if options.n < 1:
        raise ValueError(f"n is {options.n}: it must be at least 1")
    if options.n > MOST_RESPONSES:
        raise ValueError(f"n is {options.n}: it must be at most {MOST_RESPONSES}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m threadweaver.generate",
        description="Continue a prompt, threads side by side.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--prompt", type=str, help="What to answer or to continue.")
    parser.add_argument("--prompt_file", type=Path, help="File that holds the prompt instead.")
    parser.add_argument(
        "--escapes", action="store_true", help=r"Read \n, \t and \\ in --prompt as in a program."
    )
    parser.add_argument(
        "--data",
        type=str,
        help="Data file, folder or pattern of files, of which each row is answered.",
    )
    parser.add_argument("--out", type=Path, help="File for the answers to --data.")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Write over the file of --out if it is there already, without being asked.",
    )
    parser.add_argument("--n", type=int, default=1, help="How many responses.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws; same seed, same text.")
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON object, when all is done."
    )
    add_options(parser, get_args(Mode))
    return parser


def _prompt(options: Namespace) -> str:
    """The prompt of --prompt or --prompt_file.

    Raises:
        ValueError: not exactly one of them, a file that cannot be read, or no response to make.
    """
    _check_n(options)
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("prompt, prompt_file: give exactly one of them")
    if options.prompt_file is not None:
        try:
            mode = options.prompt_file.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ValueError("is no file")
            return options.prompt_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"prompt_file: {options.prompt_file}: {error}") from error
    if re.search(r"[\ud800-\udfff]", options.prompt):
        raise ValueError("prompt: holds bytes that are not UTF-8; encode it as UTF-8")
    if options.escapes:
        meanings = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
        return re.sub(r"\\[nt\\]", lambda m: meanings[m[0]], options.prompt)
    return options.prompt


if __name__ == "__main__":
    # A closed pipe, as of `| head`, ends the process without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
