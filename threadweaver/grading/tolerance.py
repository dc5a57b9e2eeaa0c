"""Mathematics with a tolerance: answers that are numbers, and the error that each may have.

The rule is that of OlympiadBench (He et al., arXiv 2402.14008): the error is absolute, one for all
numbers of an answer or one for each, and several numbers are right in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from threadweaver.grading.mathematics import build_math_grader, readings

_ROUNDING = 1.01  # times the tolerance: the last digit of both numbers may be rounded


def build_tolerant_grader() -> Callable[..., bool]:
    """A function (answer, tolerances, *ground truths) -> whether it means the same as any of them,
    or is as near to one as the tolerances say, if there are any, for a `Judge` to call."""
    from math_verify import LatexExtractionConfig, parse

    same = build_math_grader()

    def number(text: str) -> float | None:
        for reading in sorted(readings(text)):
            found: list[Any] = parse(
                f"\\boxed{{{reading}}}", [LatexExtractionConfig()], parsing_timeout=0
            )
            for value in found:
                try:
                    if math.isfinite(size := float(value.evalf())):
                        return size
                except (AttributeError, TypeError, ValueError, ArithmeticError):
                    continue
        return None

    def near(answer: str, truth: str, tolerances: Sequence[float]) -> bool:
        wanted, left = ([number(part) for part in _parts(text)] for text in (truth, answer))
        if len(wanted) != len(left) or None in (*wanted, *left):
            return False
        limits = list(tolerances) * len(wanted) if len(tolerances) == 1 else tolerances
        if len(limits) != len(wanted):
            return False
        for value, limit in zip(wanted, limits, strict=True):
            distances = [abs((other or 0.0) - (value or 0.0)) for other in left]
            if min(distances) > limit * _ROUNDING:
                return False
            del left[distances.index(min(distances))]
        return True

    def grade(answer: str, tolerances: Sequence[float], *truths: str) -> bool:
        if same(answer, *truths):
            return True
        return bool(tolerances) and any(near(answer, truth, tolerances) for truth in truths)

    return grade


def _parts(text: str) -> list[str]:
    """What commas outside of brackets separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip(" $") for part in parts]
