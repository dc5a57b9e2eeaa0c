"""`python -m threadweaver.train KIND --config FILE --key.sub value ... [--resume]`

Trains a model; see configs/ for settings to start from and `KIND --help` for all of them. Kinds:

    sft         supervised fine-tuning on trajectories
    self-train  the model's own right and well-formed rollouts, then sft on them
    rl          P-GRPO
    pipeline    all three, one after another, evaluated after each

On several GPUs, or machines, the same by torchrun: `torchrun --nproc_per_node N -m
threadweaver.train KIND ...`.

Knows nothing about training: it turns arguments into settings and errors into exit codes.

Exit codes: 0; 2 for arguments, settings or data that cannot be used, with one line on stderr; 1 for
anything unexpected, among it a loss that is not finite, a full disk and too little memory; 128 and
the number of the signal when stopped by Ctrl-C (130), SIGTERM (143), a terminal that closes (129)
or an output that nobody reads any more (141), with all that was done saved.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # Before torch is loaded: when a rank ends, each of the others would print what its sockets met.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from threadweaver.command import command, expand_home, explain, fail, quiet, train_extra

with train_extra():
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from threadweaver.output import Output
    from threadweaver.train.config import PATHS, ConfigError, RunConfig, config_of, parser_of
    from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig

if TYPE_CHECKING:
    from threadweaver.train.run import Run

KINDS = {kind.command: kind for kind in (SFTConfig, SelfTrainConfig, RLConfig, PipelineConfig)}


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _main(arguments)
    from threadweaver.rank_errors import joined

    with joined():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    # Of the kind asked for alone, if it is known: each takes a while to make.
    asked = [a for a in arguments[:1] if a in KINDS] or KINDS
    parsers = {name: parser_of(KINDS[name]) for name in asked}
    parser = ArgumentParser(
        prog="python -m threadweaver.train", exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands(required=True, dest="kind")
    for name, of_kind in parsers.items():
        subcommands.add_subcommand(name, of_kind)
    kind = next((a for a in arguments if a in parsers), "sft")
    try:
        settings = parser.parse_args(arguments)
        kind = settings.kind
        settings = settings[kind]
        expand_home(settings, PATHS)
        has_folder = any(re.match(r"--run_dir(=|$)", argument) for argument in arguments)
        if settings.resume and settings.config and not has_folder:
            from threadweaver.train.run_dir import in_own_folder

            settings = in_own_folder(settings, Path(str(settings.config[-1])))
        config = config_of(KINDS[kind], settings)
    except ArgumentError as error:
        line = explain(str(error), parsers[kind].get_defaults())
        return fail(line.replace("Problems parsing config", _config_file(arguments)), 2)
    except ConfigError as error:
        return fail(error, 2)
    except ValueError as error:  # the parser's own are of the file: its bytes and its numbers
        what = "not UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
        return fail(f"{_config_file(arguments)}: {what}{error}", 2)
    except OSError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.train.interrupt import Interrupts, exit_code
    from threadweaver.train.not_finite import NotFiniteError

    quiet()
    # Tables in a file are wide enough for most paths.
    width = None if sys.stdout.isatty() else 160
    console = Console(file=cast(IO[str], Output(sys.stdout)), width=width)
    # Optimizer steps end before a run stops; all else is done again when it is resumed.
    with Interrupts(at_once=True):
        try:
            if settings.plan:
                return _plan(config, console)
            run = _kind_of_run(kind).prepare(config, settings.resume, console)
        except (ValueError, OSError) as error:
            return fail(error, 2)
        except KeyboardInterrupt as error:
            return fail("interrupted before the first step; nothing is lost", exit_code(error))
        if run is None:
            return 0
        try:
            return run.run()
        except ValueError as error:
            return fail(error, 2)
        except (NotFiniteError, NonFiniteLogits) as error:
            return fail(error, 1)
        except KeyboardInterrupt as error:
            message = "interrupted; continue from what was saved with --resume"
            return fail(message, exit_code(error))


def _plan(config: RunConfig, console: Console) -> int:
    from threadweaver import ranks
    from threadweaver.train.memory.command import show_plan

    return ranks.on_first(lambda: show_plan(config, console))


def _config_file(arguments: list[str]) -> str:
    """The last file that --config names, as errors name it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", default="config", const="config")
    return parser.parse_known_args(arguments)[0].config


def _kind_of_run(kind: str) -> type[Run[Any]]:
    if kind == "sft":
        from threadweaver.train.sft import SFTTrainer as Kind
    elif kind == "self-train":
        from threadweaver.train.self_train import SelfTraining as Kind
    elif kind == "rl":
        from threadweaver.train.rl import RLTrainer as Kind
    else:
        from threadweaver.train.pipeline import Pipeline as Kind
    return Kind


if __name__ == "__main__":
    sys.exit(main())
