"""Which tokens a response may go on with: a mask on its logits, of a grammar for example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The state of one response, which it follows token by token."""

    def allowed(self, vocabulary: int) -> Tensor:
        """bool [V], on the CPU: which tokens may come next, one of them at least."""
        ...

    def accept(self, token: int) -> None:
        """Goes on to the state after a token, which was allowed."""
        ...


def constrained(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """Logits [S, V], with -inf for tokens that a row's constraint rules out. Without constraints
    they are the argument itself."""
    if all(constraint is None for constraint in constraints):
        return logits
    masked = logits.clone()
    for row, constraint in zip(masked, constraints, strict=True):
        if constraint is not None:
            row.masked_fill_(~constraint.allowed(len(row)).to(row.device), -math.inf)
    return masked
