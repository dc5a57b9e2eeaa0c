"""`python -m tests.fuzz [--seed 0] [--first 0] [--count 2000] [--only WORD]`: runs bad inputs.

Prints each that ended as it must not, with its number, and then how many were refused and accepted
by command. `--first N --count 1` plays one again, with what it wrote.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.inputs import make
from tests.fuzz.place import Place
from tests.fuzz.verdict import ending, fault, remove, run
from threadweaver.command import quiet

ROOT_LENGTH = 150  # of the path of all files, if the given one is shorter


def fuzz(root: Path, seed: int, numbers: range, only: str = "", verbose: bool = False) -> list[str]:
    """A line or more for each input that ended as it must not."""
    # Paths stand in files that are damaged at a random place: of one length wherever the root is.
    root /= "x" * max(1, ROOT_LENGTH - len(f"{root}/"))
    root.mkdir()
    place, faults = Place(root), []
    counts: Counter[tuple[str, str]] = Counter()
    for index in numbers:
        folder = root / f"{index}"
        given = make(place, seed, index, folder)
        if only in given.kind:
            current = root / "current" / f"{index}"
            outcome = run(given, current)
            wrong = fault(given, outcome, current)
            counts[given.command, ending(outcome)] += 1
            if verbose:
                print(f"{given}\n{outcome}", flush=True)
            if wrong:
                line = f"seed {seed}, input {index}: {given.command}, {given.kind}: {wrong}"
                if outcome.stderr and "traceback" not in wrong:
                    line += f"\n    {outcome.stderr.strip()[:1500]}"
                faults.append(line)
                print(line, file=sys.__stdout__, flush=True)
            remove(current)
        remove(folder)
    for (command, end), count in sorted(counts.items()):
        print(f"{command}: {count} {end}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", default="", help="of the kind that holds this word")
    given = parser.parse_args()
    faulthandler.enable()
    quiet()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        numbers = range(given.first, given.first + given.count)
        faults = fuzz(Path(root), given.seed, numbers, given.only, verbose=given.count == 1)
    print(f"{len(faults)} of {given.count} ended as they must not")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
