"""`python -m bench COMMAND ...`; `python -m bench COMMAND --help` for its arguments.

    list    the suites, and which of their peers can run here
    run     run suites, each into a result file
    compare compare two results: what became slower
    report  write results as a document with pictures
    profile the time of our peers of a suite by kernel
    step    the time of one engine step by kernel
    memory  what runs of Qwen3 models hold on a GPU, by their plans, as tables
    gpu     all tests, benchmarks and profiles on a GPU, in a fixed time

Exit codes: 0; 1 for a wrong result, a failure of ours or a regression; 2 for arguments or files
that cannot be used, with one line on stderr.
"""

from __future__ import annotations

import importlib
import sys

from threadweaver.command import fail

# Command -> a module with main(arguments) -> exit code, which is imported only when it is called.
COMMANDS = {
    "list": "bench.listing",
    "run": "bench.running",
    "compare": "bench.compare",
    "report": "bench.report",
    "profile": "bench.profile",
    "step": "bench.step_profile",
    "memory": "bench.memory",
    "gpu": "bench.gpu",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        got = f"no command {arguments[0]!r}" if arguments else "no command"
        return fail(f"{got}: one of {', '.join(COMMANDS)}; see python -m bench --help", 2)
    return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
