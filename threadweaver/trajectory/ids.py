"""Token ids as callers give them, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST_IDS = 2**31  # as many as the kernels tell apart


def token_ids(ids: Iterable[int], name: str, end: int = MOST_IDS) -> list[int]:
    """A new list of the same ids.

    Args:
        ids: a list, NumPy array, 1-D tensor or other iterable of integers in [0, end).
        name: what they are, for the error.

    Raises:
        ValueError: one is no integer (a bool is none) or out of range; names the first such.
    """
    values: Any = ids.tolist() if hasattr(ids, "tolist") else ids  # pyright: ignore[reportAttributeAccessIssue] (an array or tensor)
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"{name}: expected a list of token ids, got {values!r}") from None
    if not set(map(type, values)) <= {int}:
        values = [_integer(value, i, name) for i, value in enumerate(values)]
    if values and (min(values) < 0 or max(values) >= end):
        at, value = next((i, v) for i, v in enumerate(values) if not 0 <= v < end)
        raise ValueError(f"{name}: id {at} is {value}: it must be at least 0 and below {end}")
    return values


def _integer(value: Any, at: int, name: str) -> int:
    # Scalars of NumPy and 0-D tensors give numbers of Python.
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{name}: id {at} is {value!r}: token ids are integers")
    return int(number)
