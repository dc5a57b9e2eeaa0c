"""The processes of a run: those that torchrun started, or this one alone.

Every function works in one process too, where it costs nothing. Those that all ranks must call
together say so. Numbers and objects travel over gloo, on the CPU; the tensors of a sharded model
over the device's own backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# How long the ranks wait for each other at the start, and for a collective to end. A rank that
# decodes a long tail of rollouts keeps the others waiting.
JOIN_SECONDS = 600
COLLECTIVE_SECONDS = 4 * 3600

_store: dist.Store | None = None


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device, seconds: float = JOIN_SECONDS) -> None:
    """Joins the other ranks; all call it, once, before anything below.

    Args:
        device: where this rank computes.
        seconds: how long to wait for the others.

    Raises:
        ValueError: they did not all come.
    """
    global _store
    found = dist.rendezvous("env://", timeout=timedelta(seconds=seconds))
    try:
        _store, rank, size = next(iter(found))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", _store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ValueError(
            f"not all {os.environ['WORLD_SIZE']} ranks came within {seconds:.0f} seconds: start "
            "torchrun on every node, with the same --nnodes, --nproc_per_node and address"
        ) from error


def leave() -> None:
    """Ends what `join` began; in one process, nothing."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def store() -> dist.Store | None:  # pyright: ignore[reportPrivateImportUsage]
    """Which all ranks read and write without waiting for each other; None in one process."""
    return _store


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that logs, saves and shows."""
    return rank() == 0


def sums(values: Sequence[float]) -> list[float]:
    """Over all ranks, value by value, in float64. All call it, with as many values."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank. All call it."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of rank 0, on every rank. All call it."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    """Returns when all ranks have called it."""
    if size() > 1:
        dist.barrier(device_ids=None)


class SharedQueue:
    """The numbers 0 to count - 1, each of which one rank gets.

    Args:
        name: of the queue, the same on all ranks and never used again.
        count: how many numbers.
    """

    def __init__(self, name: str, count: int):
        self._key = f"queue/{name}"
        self._count = count
        self._next = 0

    def take(self) -> int | None:
        """The next number; None if all are taken."""
        if _store is None:
            number, self._next = self._next, self._next + 1
        else:
            number = _store.add(self._key, 1) - 1
        return number if number < self._count else None

    def __iter__(self) -> Iterator[int]:
        while (number := self.take()) is not None:
            yield number
