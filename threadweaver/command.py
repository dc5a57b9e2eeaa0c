"""What the commands have in common: how they say that something is wrong, and nothing else."""

from __future__ import annotations

import difflib
import re
import sys

from jsonargparse import Namespace


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
    """Keeps `transformers` off stderr, where the one line of an error goes."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
