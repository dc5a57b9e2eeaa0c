"""The processes of a run: those that torchrun started, or this one alone.

Every function works in one process too, where it costs nothing. Those that all ranks must call
together say so. Numbers and objects travel over gloo, on the CPU; the tensors of a sharded model
over the device's own backend.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

# How long the ranks wait for each other at the start, and for a collective to end. A rank that
# decodes a long tail of rollouts, or loads a large model, keeps the others waiting.
JOIN_SECONDS = 600.0
COLLECTIVE_SECONDS = 4 * 3600.0
# How long rank 0 stays for those that still look at what is in its process, when all are ending:
# long enough for processes that a busy machine keeps waiting. It goes as soon as they have gone.
GONE_SECONDS = 10.0
LOOK_SECONDS = 0.05  # between two looks at whether something has become so
MISSING = "not all came"  # key that is there when a rank has waited in vain
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # in the environment, beside WORLD_SIZE

_store: Store | None = None
_attempt = ""  # what keys of the ranks begin with: see _attempt_of


class NotAllCame(ValueError):  # noqa: N818 (named for what was found)
    """Ranks are missing at the start.

    Attributes:
        is_told: whether another rank says so.
        store: what those that came share; None: not even that is there.
    """

    def __init__(self, seconds: float, is_told: bool, store: Store | None = None):
        super().__init__(
            f"not all {os.environ['WORLD_SIZE']} ranks came within {seconds:g} seconds: start "
            "torchrun on every node, with the same --nnodes, --nproc_per_node and address"
        )
        self.is_told = is_told
        self.store = store


def join(seconds: float | None = None) -> Store:
    """Joins the other ranks; all call it, once, before anything below.

    Args:
        seconds: how long to wait for the others; default: TW_JOIN_SECONDS of the environment, or
            JOIN_SECONDS.

    Returns:
        What they share, to pass each other notes.

    Raises:
        NotAllCame: so many seconds have passed.
        ValueError: the environment is not torchrun's, or the ranks cannot reach each other.
    """
    global _store, _attempt
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {missing[0]} is not set: start several "
            "ranks with torchrun, or one process without WORLD_SIZE"
        )
    if seconds is None:
        given = os.environ.get("TW_JOIN_SECONDS", JOIN_SECONDS)
        try:
            seconds = float(given)
        except ValueError:
            raise ValueError(f"TW_JOIN_SECONDS is {given}: it must be a number") from None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    last = time.monotonic() + seconds
    try:
        all_attempts = _shared_store(rank, seconds)
        if all_attempts is None:
            raise NotAllCame(seconds, is_told=local_rank() > 0)
        _attempt = _attempt_of(rank, all_attempts)
        store = PrefixStore(_attempt, all_attempts)
        store.set(f"came/{rank}", "")
        keys = [f"came/{other}" for other in range(size)]
        # The first whose time is over says so for all: they would end at different times.
        becomes(lambda: store.check(keys) or store.check([MISSING]), last - time.monotonic())
        if store.check([MISSING]) or not store.check(keys):
            raise NotAllCame(seconds, _is_told(store), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
    except RuntimeError as error:  # PyTorch's own, of the store and of gloo
        address, port = _address()
        raise ValueError(
            f"rank {rank} cannot join the others at {address}:{port} "
            f"({in_one_line(error)}): is a rank gone, the port taken, or "
            "GLOO_SOCKET_IFNAME to name the network between the machines?"
        ) from error
    _store = store
    return store


def _shared_store(rank: int, seconds: float) -> Store | None:
    """Of torchrun if it has one, else of rank 0; None if that is not there after so many
    seconds."""
    address = _address()
    is_ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def is_there() -> bool:
        # PyTorch would write lines of its own while it tries.
        with suppress(OSError), socket.create_connection(address, timeout=1):
            return True
        return False

    if not is_ours and not becomes(is_there, seconds):
        return None
    return TCPStore(*address, is_master=is_ours, wait_for_workers=False)


def _attempt_of(rank: int, store: Store) -> str:
    """A name of this start of the ranks: torchrun keeps its store when it restarts them
    (--max-restarts), with all that they wrote there before."""
    # A node counts the restarts that it began alone, a rank those in which it came so far.
    starts = store.add(f"starts/{rank}", 1) - 1
    return f"attempt/{max(starts, int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')))}"


def _address() -> tuple[str, int]:
    """Of what the ranks share."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def another_client() -> Store:
    """Of what the ranks share: one that waits for an answer keeps others of its own waiting."""
    return PrefixStore(_attempt, TCPStore(*_address(), is_master=False, wait_for_workers=False))


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a collective that another rank has left, by its end."""
    words = ("gloo", "NCCL", "peer")
    failed = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return size() > 1 and isinstance(error, RuntimeError) and failed


def in_one_line(error: RuntimeError) -> str:
    """What PyTorch met with among ranks, without the trace of C++ that may follow."""
    return " ".join(str(error).split())[:300]


def becomes(is_so: Callable[[], bool], seconds: float) -> bool:
    """Waits until something is so, at most so many seconds; whether it is then."""
    last = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < last:
        time.sleep(LOOK_SECONDS)
    return found


def _is_told(store: Store) -> bool:
    """Whether another rank has asked this before, or is gone already."""
    try:
        return store.add(MISSING, 1) > 1
    except dist.DistError:
        return local_rank() > 0


def go(store: Store, seconds: float | None = None) -> None:
    """Tells the others that this rank is about to end, and needs the store no more. Rank 0, in
    whose process it may be, waits until all that came have told so.

    Args:
        seconds: how long at most; default: GONE_SECONDS.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with suppress(dist.DistError):  # it is gone already
        store.set(f"gone/{rank}", "")
        if rank == 0:
            came = [f"gone/{other}" for other in range(size) if store.check([f"came/{other}"])]
            becomes(lambda: store.check(came), GONE_SECONDS if seconds is None else seconds)


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


def local_rank() -> int:
    """Of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


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


def largest(value: int) -> int:
    """Of the values of all ranks. All call it."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


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


def on_first(compute: Callable[[], T]) -> T:
    """What rank 0 computes, or the error that it raises, on every rank. All call it."""
    if size() == 1:
        return compute()
    value: Any = None
    error: Exception | None = None
    if is_first():
        try:
            value = compute()
        except Exception as caught:
            error = caught
    value, error = from_first((value, error))
    if error is not None:
        raise error
    return value


def take_gpu() -> None:
    """Makes the GPU of this rank the one that "cuda" means.

    Raises:
        ValueError: this machine has fewer than it has ranks.
    """
    count = torch.cuda.device_count()
    if local_rank() >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank()}, and this machine has {count} GPUs: --nproc_per_node "
            f"{count} at most, or --compute.device cpu"
        )
    torch.cuda.set_device(local_rank())


def launcher() -> str:
    """How commands that this one names are to be started, up to the module."""
    if size() == 1:
        return "python -m"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = "" if here == size() else f" --nnodes {size() // here}"
    return f"torchrun{nodes} --nproc_per_node {here} -m"


def wait_for_all() -> None:
    """Returns when all ranks have called it."""
    sums([0.0])


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
