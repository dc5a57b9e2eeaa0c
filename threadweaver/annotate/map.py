"""Step 1: the teacher says what the steps of the reasoning are, and which are parallel.

    1 [1-3] understand: what is asked
    2 [4-11] work: both cases
    2.1 [4-7] work: n is even
    2.2 [8-11] work: n is odd
    3 [12-14] check: put the result in
    parallel 2.1 | 2.2

A step is a main step, or a substep of the one before it; ranges are of lines, both ends in it.
A unit of a group is a step or a run of them ("3-4", "2.1-2.3").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from threadweaver.annotate.failures import Breach

KINDS = ("understand", "work", "check", "dead-end")
PARALLEL = "parallel"
MOST_STEPS = 99

_STEP = re.compile(
    rf"([0-9]+)(?:\.([0-9]+))? \[([0-9]+)-([0-9]+)\] ({'|'.join(KINDS)}): *(\S.*)", re.ASCII
)
_UNIT = re.compile(r"([0-9]+)(?:\.([0-9]+))?(?:-([0-9]+)(?:\.([0-9]+))?)?", re.ASCII)

Range = tuple[int, int]  # of lines, counted from 1, both ends in it


@dataclass(frozen=True)
class Step:
    """A main step, or substep `sub` of it."""

    main: int
    sub: int | None
    lines: Range
    kind: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.main}" if self.sub is None else f"{self.main}.{self.sub}"


@dataclass(frozen=True)
class Map:
    """Steps in order, and for each group the units, each a run of steps."""

    steps: list[Step]
    groups: list[list[list[Step]]]

    @property
    def ranges(self) -> list[list[Range]]:
        """For each group the lines of its units."""
        return [[(u[0].lines[0], u[-1].lines[1]) for u in group] for group in self.groups]


def read_map(reply: str, line_count: int) -> Map:
    """A reply about a reasoning of so many lines.

    Raises:
        Breach: it has another form, or breaks a rule.
    """
    steps: list[Step] = []
    groups: list[str] = []
    for line in filter(None, (line.strip(" \t\r") for line in reply.split("\n"))):
        if line.startswith("```"):
            continue
        if line.startswith(f"{PARALLEL} "):
            groups.append(line.removeprefix(PARALLEL))
        elif groups:
            raise Breach("form", f"after the first '{PARALLEL}' there may be no {line[:60]!r}")
        elif found := _STEP.fullmatch(line):
            main, sub, first, last = (None if n is None else int(n[:9]) for n in found.groups()[:4])
            assert main is not None and first is not None and last is not None
            steps.append(Step(main, sub, (first, last), found[5], found[6]))
        else:
            raise Breach("form", f"this line is neither a step nor a group: {line[:60]!r}")
    if not steps:
        raise Breach("form", "there is no step in the reply")
    _check_steps(steps, line_count)
    by_name = {step.name: i for i, step in enumerate(steps)}
    read = [_group(text, steps, by_name) for text in groups]
    _check_groups(read)
    return Map(steps, read)


def _check_steps(steps: list[Step], line_count: int) -> None:
    main, sub = 0, 0
    for step in steps:
        if step.sub is None:
            main, sub = main + 1, 0
        else:
            sub += 1
        expected = f"{main}" if step.sub is None else f"{main}.{sub}"
        if step.name != expected or main == 0:
            raise Breach(
                "rule",
                f"step {step.name} stands where {expected if main else 1} should: main steps count "
                "1, 2, 3, ... and the substeps of each come right after it, 1.1, 1.2, ...",
            )
    mains = [step for step in steps if step.sub is None]
    _check_ranges(mains, 1, line_count, "the reasoning")
    for main_step in mains:
        substeps = [s for s in steps if s.main == main_step.main and s.sub is not None]
        if substeps:
            _check_ranges(substeps, *main_step.lines, f"step {main_step.name}")


def _check_ranges(steps: list[Step], first: int, last: int, whole: str) -> None:
    """The ranges follow each other without gap or overlap, from the first line to the last."""
    expected = first
    for step in steps:
        if step.lines[0] != expected:
            raise Breach(
                "rule",
                f"step {step.name} starts at line {step.lines[0]} and must start at {expected}: "
                "every line belongs to one step, in order",
            )
        if step.lines[1] < step.lines[0]:
            raise Breach("rule", f"step {step.name} ends before it starts")
        expected = step.lines[1] + 1
    if expected != last + 1:
        raise Breach(
            "rule",
            f"step {steps[-1].name} ends at line {expected - 1} and must end at {last}, the last "
            f"of {whole}",
        )


def _group(text: str, steps: list[Step], by_name: dict[str, int]) -> list[list[Step]]:
    units = []
    for part in map(str.strip, text.split("|")):
        found = _UNIT.fullmatch(part)
        if not found:
            raise Breach("form", f"a group has the unit {part[:60]!r}: write '2', '2-3' or '2.1'")
        names = part.split("-")
        if missing := [name for name in names if name not in by_name]:
            raise Breach("rule", f"a group names step {missing[0]}, which there is not")
        one, other = (steps[by_name[name]] for name in (names[0], names[-1]))
        level = [s for s in steps if (s.sub is None) == (one.sub is None)]
        if (one.sub is None) != (other.sub is None) or (one.sub and one.main != other.main):
            raise Breach("rule", f"unit {part} is no run of main steps, nor of substeps of one")
        unit = level[level.index(one) : level.index(other) + 1]
        if not unit:
            raise Breach("rule", f"unit {part} ends before it starts")
        units.append(unit)
    first = units[0][0]
    for left, right in pairwise(units):
        same_level = (right[0].sub is None) == (first.sub is None)
        same_step = first.sub is None or right[0].main == first.main
        if not same_level or not same_step or right[0].lines[0] != left[-1].lines[1] + 1:
            raise Breach(
                "rule",
                f"step {right[0].name} does not come right after step {left[-1].name}: the units "
                f"of a group are neighbours, all main steps or all substeps of one",
            )
    for step in (step for unit in units for step in unit):
        if step.kind == "understand":
            raise Breach(
                "rule",
                f"step {step.name} understands the problem, and that is parallel to nothing",
            )
    return units


def _check_groups(groups: list[list[list[Step]]]) -> None:
    """No step is in two groups, not even as a part of another; main steps come first."""
    taken: dict[int, str] = {}
    substeps_seen = False
    for group in groups:
        is_main = group[0][0].sub is None
        if is_main and substeps_seen:
            raise Breach("rule", "groups of main steps come before groups of substeps")
        substeps_seen = substeps_seen or not is_main
        for step in (step for unit in group for step in unit):
            for line in range(step.lines[0], step.lines[1] + 1):
                if line in taken:
                    raise Breach(
                        "rule",
                        f"step {step.name} is in a group, and so is step {taken[line]}: a step is "
                        "in one group at most, and groups do not nest",
                    )
            for line in range(step.lines[0], step.lines[1] + 1):
                taken[line] = step.name
