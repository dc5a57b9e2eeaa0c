"""`python -m threadweaver.train sft --config FILE --key.sub value ... [--resume]`

Trains a model; see configs/ for settings to start from and `sft --help` for all of them. Knows
nothing about training: it turns arguments into settings and errors into exit codes.

Exit codes: 0; 2 for arguments, settings or data that cannot be used, with one line on stderr; 1 for
anything unexpected, a loss that is not finite among it; 130 and 143 when stopped by Ctrl-C or
SIGTERM, with all that was done saved.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError

from jsonargparse import ArgumentParser
from rich.console import Console

from threadweaver.train.config import SFTConfig, explain, sft_parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    sft = sft_parser()
    parser = ArgumentParser(prog="python -m threadweaver.train", exit_on_error=False)
    parser.add_subcommands(required=True).add_subcommand("sft", sft)
    try:
        settings = parser.parse_args(arguments).sft
        config = SFTConfig(**_fields(sft.instantiate(settings)))
    except ArgumentError as error:
        return _fail(explain(str(error), sft.get_defaults()), 2)
    except ValueError as error:
        return _fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from transformers.utils import logging

    from threadweaver.train.loop import prepare
    from threadweaver.train.not_finite import NotFiniteError

    # On stderr: the one line of an error, and nothing else.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        trainer = prepare(config, settings.resume, Console())
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted before the first step", 130)
    if trainer is None:
        return 0
    try:
        return trainer.run()
    except NotFiniteError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; continue from the last checkpoint with --resume", 130)


def _fields(settings) -> dict:
    return {name: getattr(settings, name) for name in SFTConfig.__dataclass_fields__}


def _fail(error: Exception | str, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
