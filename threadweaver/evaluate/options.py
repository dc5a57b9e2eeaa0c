"""The options of `python -m threadweaver.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from threadweaver.command import is_writable
from threadweaver.generate.options import add_options
from threadweaver.generate.server.address import ServerSettings
from threadweaver.generate.settings import MOST_RESPONSES
from threadweaver.generate.weaver import Mode
from threadweaver.tasks import task_names

MODES: dict[str, list[Mode]] = {
    "parallel": ["parallel"],
    "sequential": ["sequential"],
    "both": ["sequential", "parallel"],
}
FILES = ("json", "responses")
PATHS = ("model", "task", "task_options.path", "overlap", *FILES)


def build_parser() -> ArgumentParser:
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
        help="Its options, such as '{digits: 3}'; of a data file, '{held_out: 1}' takes every row; "
        "of a benchmark, '{path: FILE}' or '{path: NAME_ON_THE_HUB}'.",
    )
    parser.add_argument(
        "--n",
        "--problems",  # torchrun takes --n for an abbreviation of options of its own
        type=int | None,
        help="How many problems; null: all that are held out. With torchrun: --problems.",
    )
    parser.add_argument(
        "--samples",
        type=int | None,
        help="Responses to each problem. Default: of a benchmark its own number, else 1.",
    )
    parser.add_argument(
        "--at_once",
        type=int | None,
        help="Problems decoded at the same time; 1 measures what one user waits for. Default: all.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the problems and of the draws.")
    parser.add_argument(
        "--overlap",
        type=str,
        nargs="+",
        default=[],
        help="Files that the model was trained on: how many problems share 13 words in a row with "
        "them.",
    )
    parser.add_argument("--json", type=Path, help="File for all figures.")
    parser.add_argument("--responses", type=Path, help="File for all responses, as JSON lines.")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Write over files that are there already, without being asked.",
    )
    parser.add_argument(
        "--server",
        type=str | None,
        help="Address of a completions server that decodes (vLLM, SGLang, ...); --model is then "
        "where its tokenizer and config lie, and --max_sequences the most requests at once.",
    )
    parser.add_argument(
        "--server_model",
        type=str | None,
        help="What the server calls the model, if it has several.",
    )
    parser.add_argument(
        "--server_timeout", type=float, default=600.0, help="Seconds until a request is given up."
    )
    parser.add_argument(
        "--server_retries", type=int, default=2, help="How often a failed request is sent again."
    )
    add_options(parser, list(MODES))
    return parser


def server_settings(options: Namespace) -> ServerSettings | None:
    """Raises ValueError for a server option out of range, or one without a server."""
    if options.server is None:
        if options.server_model is not None:
            raise ValueError("server_model: give --server too")
        return None
    return ServerSettings(
        options.server, options.server_model, options.server_timeout, options.server_retries
    )


def check(options: Namespace) -> None:
    """Raises ValueError for numbers out of range and files that could not be written at the end."""
    for name in ("n", "samples", "at_once"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name} is {options[name]}: it must be at least 1")
    for name in FILES:
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
    at_once = (options.at_once or options.n or 1) * (options.samples or 1)
    if at_once > MOST_RESPONSES:
        raise ValueError(
            f"n, samples: {at_once:,} responses at once; at most {MOST_RESPONSES:,} can be decoded "
            "together (--at_once)"
        )
