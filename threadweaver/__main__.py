"""`threadweaver COMMAND ...`: every command of this package; the same as `python -m`.

    train       train a model: sft, self-train, rl, or the pipeline of all three
    generate    continue a prompt, its threads at the same time
    evaluate    solve held-out problems of a task and report every metric; also: eval
    annotate    make parallel trajectories out of sequential ones, with the help of a teacher
    tasks       write a task's data
    view        pages to look at: trajectories, the trie of one, a run
    add-tags    add the tags of the trajectory format to a model and its tokenizer

`threadweaver COMMAND --help` lists the settings of a command.

Exit codes: those of the command; 2 for an unknown one, with one line on stderr.
"""

import difflib
import runpy
import sys
from importlib.metadata import version

MODULES = {
    "train": "threadweaver.train",
    "generate": "threadweaver.generate",
    "evaluate": "threadweaver.evaluate",
    "eval": "threadweaver.evaluate",
    "annotate": "threadweaver.annotate",
    "tasks": "threadweaver.tasks",
    "view": "threadweaver.view",
    "add-tags": "threadweaver.add_tags",
}


def main() -> None:
    """Runs the command that the process's first argument names, with the rest of its arguments."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "--version":
        print(f"threadweaver {version('threadweaver')}")
    elif command in MODULES:
        del sys.argv[1]
        try:
            runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
        except KeyboardInterrupt:  # before the command can say so itself
            print("error: interrupted", file=sys.stderr)
            sys.exit(130)
    else:
        near = difflib.get_close_matches(command, MODULES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(MODULES)}"
        print(f"error: unknown command '{command}': {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
