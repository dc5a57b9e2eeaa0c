"""`python -m threadweaver.annotate --data FILE --student MODEL --teacher.url URL
--teacher.model NAME --out DIR`, or `--teacher.model PATH` alone: a teacher in our own engine.

Makes parallel trajectories out of a model's own sequential responses
(docs/semantics.md, "Trajectory generator"). DIR/kept.jsonl is what `train sft` reads. Problems
without a response are answered by the student first; only right answers go on.

The same command goes on where it was stopped or killed, and asks the teacher nothing twice. Where
the teacher gave no reply it is asked again. Wrong answers that generation.max_tokens cut off are
made again if it is larger than it was. --limit N takes the first N problems; --dry_run prints
what the teacher would be asked.

Exit codes: 0; 2 for arguments, data, models or a server that cannot be used, with one line on
stderr; 1 for anything unexpected, a teacher that answers no more among it; 128 and the number of
the signal when stopped. The first signal lets open requests end.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentError
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from threadweaver.command import (
    command,
    expand_home,
    explain,
    fail,
    quiet,
    refuse_ranks,
    train_extra,
)

with train_extra():
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from threadweaver.annotate.prompts import Prompts
    from threadweaver.annotate.settings import AnnotateSettings, TeacherSettings
    from threadweaver.generate.options import EngineSettings
    from threadweaver.generate.settings import GenerationSettings
    from threadweaver.output import Output
    from threadweaver.progress import has_no_reader, print_line
    from threadweaver.trajectory import TemplateConfig


@command
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    refuse_ranks()
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
        expand_home(parsed, ("data", "student", "teacher.model", "prompts", "out"))
        given = vars(parser.instantiate(parsed))
        given["generation"] = replace(given["generation"], mode="sequential")
        options = AnnotateSettings(**given)
        prompts = Prompts(options.prompts)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except ValueError as error:
        return fail(error, 2)
    # After the arguments are known to be good: these take seconds to import.
    from threadweaver.annotate.annotation import Annotation, print_prompts
    from threadweaver.annotate.report import print_summary
    from threadweaver.annotate.run import Stopped, TeacherIsGone
    from threadweaver.generate.engine import NonFiniteLogits
    from threadweaver.tasks.data_file import DataFile

    quiet()
    # Tables in a file are wide enough for most paths.
    width = None if sys.stdout.isatty() else 160
    console = Console(file=cast(IO[str], Output(sys.stdout)), width=width)
    progress = Console(file=cast(IO[str], Output(sys.stderr)))
    again = "every reply is saved: run the same command again to go on"
    try:
        task = DataFile(options.data, held_out=0.0)
        problems = task.problems("train", None)[: options.limit]
        if options.dry_run:
            print_prompts(console, problems, prompts)
            return 0
        for note in task.notes:
            print_line(console, note)
        with Annotation.begin(options, task, problems, prompts, console, progress) as annotation:
            annotation.answer()
            annotation.ask_teacher()
            summary = annotation.finish()
    except ValueError as error:
        return fail(error, 2)
    except NonFiniteLogits as error:
        return fail(error, 1)
    except TeacherIsGone as error:
        return fail(f"the teacher answers no more ({error}): {again}", 1)
    except Stopped as error:
        return fail(f"stopped: {again}", 128 + error.number)
    except KeyboardInterrupt:
        return fail(f"interrupted: {again}", 128 + signal.SIGINT)
    print_summary(console, summary, annotation.folder)
    return 128 + signal.SIGPIPE if has_no_reader(console) else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m threadweaver.annotate",
        description="Make parallel trajectories out of sequential ones, with a teacher's help.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=str, required=True, help="Problems: a data file, a folder or a pattern."
    )
    parser.add_argument(
        "--out", type=Path | None, help="Folder for all that is made; goes on with what it holds."
    )
    parser.add_argument(
        "--student",
        type=str | None,
        help="The model that is to learn: Hugging Face folder, .gguf file, or smollm2. Answers "
        "problems that have no response; its tokenizer counts tokens.",
    )
    parser.add_argument("--limit", type=int | None, help="Only the first so many problems.")
    parser.add_argument(
        "--prompts",
        type=Path | None,
        help="Folder with files in place of the built-in prompts: map.md, independent.md, "
        "outline.md, again.md.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print what the teacher would be asked."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of draws in our own engine.")
    parser.add_class_arguments(TeacherSettings, "teacher")
    parser.add_class_arguments(GenerationSettings, "generation", skip={"mode"})
    parser.add_class_arguments(TemplateConfig, "template")
    parser.add_class_arguments(EngineSettings, "engine")
    parser.set_defaults({"generation.sampling.temperature": 0.6, "generation.sampling.top_p": 0.95})
    return parser


if __name__ == "__main__":
    sys.exit(main())
