"""Compiles the candidates, side by side."""

import sys
from argparse import ArgumentError
from concurrent.futures import ThreadPoolExecutor

from jsonargparse import ArgumentParser

from bench.candidate_kernels import CANDIDATES, Candidate, compiled
from threadweaver.command import explain, fail
from tw_kernels import cuda_build

PROG = "python -m bench.candidate_kernels"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if one of them, which is named, does not compile."""
    parser = ArgumentParser(prog=PROG, exit_on_error=False, allow_abbrev=False)
    try:
        parser.parse_args(arguments)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    if reason := cuda_build.why_not():
        return fail(reason, 2)

    def outcome(candidate: Candidate) -> str | None:
        try:
            print(f"{candidate.name}: {compiled(candidate)}")
        except RuntimeError as error:
            return f"{candidate.name}: {error}"

    with ThreadPoolExecutor() as pool:
        errors = [error for error in pool.map(outcome, CANDIDATES) if error]
    return fail("\n".join(errors), 1) if errors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
