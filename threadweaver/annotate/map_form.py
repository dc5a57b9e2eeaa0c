"""The form of a map, line by line: what it may go on with so that it keeps all rules of `map`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from threadweaver.annotate.form import Form, Part
from threadweaver.annotate.grammar import words
from threadweaver.annotate.map import KINDS, PARALLEL, Step, read_groups, read_lines

MOST_STEPS, MOST_SUBSTEPS, MOST_GROUPS = 20, 20, 8

# A step that may come next: its name, its first line, and the lines that may be its last.
Option = tuple[str, int, Iterable[int]]


def map_form(line_count: int) -> Form:
    """Of a map of a reasoning of so many lines."""

    def next_line(text: str) -> Part | None:
        steps, groups = read_lines(text)
        options = [] if groups else _next_steps(steps, line_count)
        is_whole = bool(steps) and _main(steps)[-1].lines[1] == line_count and not _inside(steps)
        rules = list(_group_rules(steps, groups)) if is_whole else []
        lines = [f'"{name} [{first}-" ({_either(ends)}) "] " rest' for name, first, ends in options]
        if rules:
            lines.append("group")
        if not lines:
            return None
        kinds = _either(f"{kind}: " for kind in KINDS)
        rules += [f"root ::= {' | '.join(lines)}", f'rest ::= ({kinds}) words "\\n"', words()]
        return Part("\n".join(rules), may_end=is_whole)

    return next_line


def _next_steps(steps: Sequence[Step], line_count: int) -> list[Option]:
    main = _main(steps)
    if not main:
        return [("1", 1, range(1, line_count + 1))]
    step = main[-1]
    first, last = step.lines
    substeps = _substeps(steps, step)
    left = MOST_SUBSTEPS - (len(steps) - len(main))
    if _inside(steps):
        start = substeps[-1].lines[1] + 1
        ends = range(start, last + 1) if left > 1 else [last]
        return [(f"{step.name}.{len(substeps) + 1}", start, ends)]
    options: list[Option] = []
    if not substeps and first < last and left > 1:
        options.append((f"{step.name}.1", first, range(first, last)))
    if last < line_count:
        ends = range(last + 1, line_count + 1) if len(main) < MOST_STEPS - 1 else [line_count]
        options.append((f"{step.main + 1}", last + 1, ends))
    return options


def _group_rules(steps: Sequence[Step], groups: Sequence[str]) -> Iterator[str]:
    """Rules of `group`, a line with a group that may come next; none if there is none."""
    starts: list[str] = []
    for r, run in enumerate(_free_runs(steps, groups)) if len(groups) < MOST_GROUPS else ():
        last = len(run) - 1

        def unit(i: int, end: int, run: Sequence[Step] = run) -> str:
            return run[i].name if i == end else f"{run[i].name}-{run[end].name}"

        for i in range(last + 1):
            # A unit that begins at step i, and those that follow it, if it is not the first.
            alternatives = [
                f'"{unit(i, end)}"' + (f' (" | " more{r}x{end + 1})?' if end < last else "")
                for end in range(i, last + 1)
            ]
            yield f"more{r}x{i} ::= {' | '.join(alternatives)}"
        for i in range(last):
            alternatives = [f'"{unit(i, end)} | " more{r}x{end + 1}' for end in range(i, last)]
            yield f"first{r}x{i} ::= {' | '.join(alternatives)}"
            starts.append(f"first{r}x{i}")
    if starts:
        yield f'group ::= "{PARALLEL} " ({" | ".join(starts)}) "\\n"'


def _free_runs(steps: Sequence[Step], groups: Sequence[str]) -> Iterator[list[Step]]:
    """Neighbouring steps, two at least, of which groups may still be made."""
    made = [[step for unit in group for step in unit] for group in read_groups(groups, steps)]
    taken = {n for group in made for s in group for n in range(s.lines[0], s.lines[1] + 1)}
    levels = [_substeps(steps, step) for step in _main(steps)]
    if not any(group[0].sub is not None for group in made):
        levels.insert(0, _main(steps))
    for level in levels:
        run: list[Step] = []
        for step in level:
            is_taken = not taken.isdisjoint(range(step.lines[0], step.lines[1] + 1))
            if is_taken or step.kind == "understand":
                if len(run) > 1:
                    yield run
                run = []
            else:
                run.append(step)
        if len(run) > 1:
            yield run


def _main(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.sub is None]


def _substeps(steps: Sequence[Step], of: Step) -> list[Step]:
    return [step for step in steps if step.main == of.main and step.sub is not None]


def _inside(steps: Sequence[Step]) -> bool:
    """Whether the substeps of the last step have yet to reach its last line."""
    return steps[-1].sub is not None and steps[-1].lines[1] < _main(steps)[-1].lines[1]


def _either(texts: Iterable[object]) -> str:
    return " | ".join(f'"{text}"' for text in texts)
