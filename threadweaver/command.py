"""What the commands share: errors in one line on stderr, also for a package that is missing."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import Namespace

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
    """Ends the process with exit code 2 and one line if a package of the extra `train` is missing.

    For a block of imports and, as a decorator, for the function of a command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in TRAIN_MODULES:
            raise
        message = f"this command needs the package '{module}': pip install 'threadweaver[train]'"
        sys.exit(fail(message, 2))


def explain(message: str, known: Namespace) -> str:
    """An argument error in one line; an unknown option with the nearest one there is."""
    line = " ".join(message.split()).replace("Parser key ", "").replace('": ', ": ").strip('"')
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '(.+?)'", line)
    if not unknown:
        return line
    name = unknown[1] or unknown[2]
    # The last part weighs double: a typo is compared with its neighbours before other sections.
    near = difflib.get_close_matches(name, list(known.keys()), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "see --help for all settings"
    return f"unknown setting '{name}': {hint}"


def fail(error: Exception | str, code: int) -> int:
    """Says in one line on stderr what was wrong; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def quiet() -> None:
    """Turns off the log lines and progress bars that `transformers` writes to stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
