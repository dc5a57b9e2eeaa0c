"""`python -m threadweaver.add_tags --model MODEL --out FOLDER`

Gives a model the tags of the trajectory format, each as one token, and saves it with its tokenizer
as a plain Hugging Face folder, in the dtype of its weights. What the new tokens start from:
docs/semantics.md, "Trajectory". A model needs training before it writes them.

Exit codes: 0; 2 for a model or folder that cannot be used, with one line on stderr.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from pathlib import Path

from threadweaver.command import (
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
    from jsonargparse import ArgumentParser


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    refuse_ranks()
    parser = ArgumentParser(
        prog="python -m threadweaver.add_tags",
        description="Add the tags of the trajectory format to a model and its tokenizer.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="Hugging Face folder, .gguf file, or smollm2.",
    )
    parser.add_argument("--out", type=Path, required=True, help="New folder to save to.")
    try:
        options = parser.parse_args(arguments)
        expand_home(options, ("model", "out"))
        check_new(options.out)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.model import add_tags, load_model, save_model

    quiet()
    try:
        model, tokenizer = load_model(options.model, "auto")
    except ValueError as error:
        return fail(error, 2)
    added = add_tags(tokenizer, model)
    save_model(model, tokenizer, options.out)
    print(f"{options.out}: added {', '.join(added) or 'nothing, the tags were there'}")
    return 0


def check_new(folder: Path) -> None:
    """Raises ValueError if a folder holds something, is none, or could not be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"out: {folder} is not empty; name a new folder")
    if not is_writable(folder):
        raise ValueError(f"out: {folder} cannot be written; name another folder")


if __name__ == "__main__":
    sys.exit(main())
