"""`python -m threadweaver.train KIND --config FILE --key.sub value ... [--resume]`

Trains a model; see configs/ for settings to start from and `KIND --help` for all of them. Kinds:

    sft         supervised fine-tuning on trajectories
    self-train  the model's own right and well-formed rollouts, then sft on them
    rl          P-GRPO
    pipeline    all three, one after another, evaluated after each

Knows nothing about training: it turns arguments into settings and errors into exit codes.

Exit codes: 0; 2 for arguments, settings or data that cannot be used, with one line on stderr; 1 for
anything unexpected, a loss that is not finite among it; 130 and 143 when stopped by Ctrl-C or
SIGTERM, with all that was done saved.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from typing import TYPE_CHECKING, Any

from threadweaver.command import explain, fail, quiet, train_extra

with train_extra():
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from threadweaver.train.config import config_of, parser_of
    from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig

if TYPE_CHECKING:
    from threadweaver.train.run import Run

KINDS = {kind.command: kind for kind in (SFTConfig, SelfTrainConfig, RLConfig, PipelineConfig)}


@train_extra()
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parsers = {command: parser_of(kind) for command, kind in KINDS.items()}
    parser = ArgumentParser(
        prog="python -m threadweaver.train", exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands(required=True, dest="kind")
    for command, of_kind in parsers.items():
        subcommands.add_subcommand(command, of_kind)
    command = next((a for a in arguments if a in KINDS), "sft")
    try:
        settings = parser.parse_args(arguments)
        command = settings.kind
        settings = settings[command]
        config = config_of(KINDS[command], parsers[command], settings)
    except ArgumentError as error:
        return fail(explain(str(error), parsers[command].get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.train.not_finite import NotFiniteError

    quiet()
    try:
        # Tables in a file are wide enough for most paths.
        console = Console(width=None if sys.stdout.isatty() else 160)
        run = _kind_of_run(command).prepare(config, settings.resume, console)
    except ValueError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted before the first step", 130)
    if run is None:
        return 0
    try:
        return run.run()
    except ValueError as error:
        return fail(error, 2)
    except (NotFiniteError, NonFiniteLogits) as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; continue from the last checkpoint with --resume", 130)


def _kind_of_run(command: str) -> type[Run[Any]]:
    if command == "sft":
        from threadweaver.train.sft import SFTTrainer as Kind
    elif command == "self-train":
        from threadweaver.train.self_train import SelfTraining as Kind
    elif command == "rl":
        from threadweaver.train.rl import RLTrainer as Kind
    else:
        from threadweaver.train.pipeline import Pipeline as Kind
    return Kind


if __name__ == "__main__":
    sys.exit(main())
