"""What the commands share: an end in one line on stderr, whatever ends them."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from threadweaver import unheard_interrupts
from threadweaver.output import drop, visible

if TYPE_CHECKING:
    from jsonargparse import Namespace

# transformers imports torchao where it is installed, which then warns of kernels that it cannot
# load and nobody here uses.
for name in ("torchao", "torch.utils._pytree"):
    getLogger(name).setLevel(ERROR)

MOST_CHARACTERS = 2000  # of an error
SECONDS_FOR_FIRST = 10.0  # that the first of several ranks has to say what is wrong

# What says an error, with its exit code, instead of `fail`, and ends the process: set while it is
# one of several ranks (rank_errors.py).
on_failure: Callable[[str, int], NoReturn] | None = None

# Modules of the packages in the extra `train` (pyproject.toml), and of those that they bring.
TRAIN_MODULES = {
    "datasets",
    "huggingface_hub",
    "jsonargparse",
    "matplotlib",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "transformers",
    "yaml",
}


@contextmanager
def train_extra() -> Iterator[None]:
    """For a block of imports: ends the process with one line and exit code 2 if a package of the
    extra `train` is missing, 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 128 + signal.SIGINT))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in TRAIN_MODULES:
            raise
        message = f"this command needs the package '{module}': pip install 'threadweaver[train]'"
        sys.exit(fail(message, 2))


P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """The function of a command, which returns an exit code, with an end in one line also for what
    it does not foresee: a missing package (2), Ctrl-C (130), a file that cannot be read or written
    (1), too little memory (1), and without one where nobody reads its output any more (141)."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            with train_extra(), unheard_interrupts.repeated():
                code = main(*args, **kwargs)
        except BrokenPipeError:
            drop(sys.stdout)
            return 128 + signal.SIGPIPE
        except OSError as error:
            code = fail(error, 2 if error.errno == errno.ENAMETOOLONG else 1)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            code = fail(_out_of_memory(error), 1)
        return _flush() or code

    return run


def refuse_ranks() -> None:
    """For a command of one process: ends each of those that torchrun started, with one line of the
    first and exit code 2."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_FIRST)  # torchrun ends all when one has ended
        sys.exit(2)
    what = "this command runs in one process: start it with python -m, not torchrun"
    sys.exit(fail(f"{what} (of several are threadweaver.train and threadweaver.eval)", 2))


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or the host; PyTorch's errors are told without importing it."""
    is_of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    is_of_device = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_of_host or is_of_device


def _out_of_memory(error: MemoryError | RuntimeError) -> str:
    """What to say of it."""
    if type(error) is MemoryError and str(error):
        return str(error)  # our own, which knows what to lower
    asked = re.search(r"([Tt]ried|Unable) to allocate (\S+ \w+)", str(error))
    what = f"out of memory{f' when {asked[2]} were asked for' if asked else ''}"
    settings = "kv_gigabytes, batch_tokens or pass_tokens"
    return f"{what}: lower {settings}, or end what else uses it"


def _flush() -> int:
    """Writes what stdout holds; an exit code if that cannot be done."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop(sys.stdout)
        is_unread = isinstance(error, BrokenPipeError)
        return 128 + signal.SIGPIPE if is_unread else fail(f"stdout: {reason(error)}", 1)
    return 0


def expand_home(options: Any, names: Iterable[str]) -> None:
    """Reads `~` at the start of paths as shells do: of `--out=~/x`, and of YAML, none has done so.

    Args:
        options: what a parser read; changed in place.
        names: of the options that are paths, or lists of them, those of a section or of a
            dictionary by dotted name; what is not there, or is no path, stays as it is.
    """
    for name in names:
        part, _, rest = name.partition(".")
        if not hasattr(options, "get") or part not in options:
            continue
        value = options[part]
        if rest:
            expand_home(value, [rest])
        else:
            options[part] = [*map(_at_home, value)] if isinstance(value, list) else _at_home(value)


def _at_home(path: Any) -> Any:
    if not isinstance(path, str | Path):
        return path
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 (Path's raises for unknown users)


def is_writable(path: Path) -> bool:
    """Whether a file or folder could be written: it, or the nearest folder above that there is."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return os.access(nearest, os.W_OK) and (nearest == path or nearest.is_dir())


def check_overwrite(paths: Iterable[Path], overwrite: bool) -> None:
    """Asks on a terminal whether files that exist are to be overwritten.

    Raises:
        ValueError: the answer is no, or nobody can be asked and `overwrite` does not say so.
    """
    found = [str(path) for path in paths if path.exists()]
    if not found or overwrite:
        return
    names = ", ".join(found)
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{names}: there already; overwrite? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ValueError(f"{names}: there already; name another place, or give --overwrite")


# Of a section that may be left out jsonargparse says all that it could have been. A name begins at
# its first character: a value of a million letters is looked through once.
_OPTIONAL_SECTION = (
    r"(?<![\w.])(?P<name>[\w.]+): Does not validate against any of the Union subtypes "
    r"Subtypes: \[<class '[\w.]+Config'>, <class 'NoneType'>\] Errors: "
    r"(- Problem with given class_path '[^']+': (?P<what>.*?) - Expected a <class 'NoneType'>)?"
    r".*Given value: (?P<value>.*)"
)


def explain(message: str, known: Namespace) -> str:
    """An argument error in one line; an unknown option with the nearest one there is."""
    line = " ".join(message.split()).replace("Parser key ", "").replace('": ', ": ").strip('"')
    if section := re.search(_OPTIONAL_SECTION, line):
        name = section["name"]
        if (what := section["what"]) is None:
            text = f"{name} is {section['value']}: it must be a section of settings"
        elif option := re.fullmatch(r"Option '(.+?)' is not accepted", what):
            text = f"unknown setting '{name}.{option[1]}': see --{name}.help"
        else:
            text = f"{name}.{what[1:]}"
        return line[: section.start()] + text
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '(.+?)'", line)
    if not unknown:
        # Of a subcommand, which the command line names before them.
        head, required, names = line.partition("arguments are required: ")
        keys = set(known.keys())
        own = (n if n in keys else n.partition(".")[2] or n for n in names.split(", "))
        return head + required + ", ".join(own)
    name = unknown[1] or unknown[2]
    # The last part weighs double: a typo is compared with its neighbours before other sections.
    near = difflib.get_close_matches(name, list(known.keys()), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "see --help for all settings"
    return f"unknown setting '{name}': {hint}"


def fail(error: Exception | str, code: int) -> int:
    """Says in one line on stderr what was wrong; returns the exit code."""
    line = reason(error) if isinstance(error, OSError) else str(error)
    line = visible(" ".join(line.split()))
    if len(line) > MOST_CHARACTERS:
        line = f"{line[: MOST_CHARACTERS // 2]} ... {line[-MOST_CHARACTERS // 2 :]}"
    if on_failure is not None:
        on_failure(line, code)
    with suppress(OSError):  # nobody reads it
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def reason(error: OSError) -> str:
    """What the system could not do, and with which file."""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what += ": make room and run it again"
    return f"{error.filename}: {what}" if error.filename else what


def quiet() -> None:
    """Turns off the log lines and progress bars that `transformers` writes to stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
