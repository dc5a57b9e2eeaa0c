"""What a decode plan is cut by: a model of what the parts of a step cost the device that runs it.

A model, and no measurement: it decides into how many pieces a run of pages is cut, how many rows
share an item and which items begin first. `DecodePlan.predicted` is what it expects of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """Shape of the attention that a plan is for."""

    query: int = 32
    kv: int = 8
    dim: int = 128


class DecodeCosts(NamedTuple):
    """Fields and formulas of csrc/trie/decode_costs.h: times, in one unit, of a worker or of all.

    Attributes:
        workers: units of work that run at a time. A unit is a piece of an item for one of kv_heads.
        kv_heads: of an item, each a unit of its own.
        group: matrix rows of a query row.
        tile_rows: most query rows of an item.
        piece_keys: pieces are multiples of so many keys, in whole pages.
        piece_keys_per_row: pieces are no shorter than so many keys for each of their rows.
        fetch: of a key and its value by one worker.
        product: of a key with 64 matrix rows, while others are fetched.
        row: of a key for each query row, after it was fetched.
        unit: to begin and end a unit.
        memory: of a key and its value of one head, by all workers together.
        partial: to write and read the partial result of a row for one KV head, by all together.
        call: whatever the step.
        waves: how many units a worker the plan may aim at, ascending; it takes a later one only if
            that promises 2 % less time.
    """

    workers: int
    kv_heads: int
    group: int
    tile_rows: int
    piece_keys: int
    piece_keys_per_row: int
    fetch: float
    product: float
    row: float
    unit: float
    memory: float
    partial: float
    call: float
    waves: tuple[float, ...]


def of_cpu(threads: int) -> DecodeCosts:
    """Costs in the time that a row takes for a key. A thread takes all heads of an item.

    Fetching a key costs about as much as attending to it from 16 rows; a partial result as much as
    some keys. Two items a thread: the fewer, the less to merge; the more, the better balance. More
    was not faster on two cores (bench.decode).
    """
    return DecodeCosts(
        workers=threads, kv_heads=1, group=1, tile_rows=64, piece_keys=64, piece_keys_per_row=8,
        fetch=16, product=0, row=1, unit=0, memory=0, partial=0, call=0, waves=(2,),
    )  # fmt: skip


class Rates(NamedTuple):
    """Of a kind of GPU, a nanosecond.

    Attributes:
        memory: bytes of a copy.
        stream: bytes that one multiprocessor fetches when few others do.
        products: operations of attention in half precision on one multiprocessor.
    """

    memory: float
    stream: float
    products: float


# By compute capability. Hopper: the copy and the attention kernel (584 TFLOP/s on 132
# multiprocessors) of an H100, both measured (docs/kernels.md). The others: data sheets, times what
# was reached of the H100's (0.9 of the bytes, 0.6 of the operations). `stream` is nowhere measured:
# half of the 64 bytes a cycle between a multiprocessor and L2.
RATES = {
    (8, 0): Rates(memory=1830, stream=45, products=1700),  # A100 80 GB
    (8, 6): Rates(memory=840, stream=54, products=520),  # RTX 3090
    (8, 9): Rates(memory=900, stream=80, products=770),  # RTX 4090
    (9, 0): Rates(memory=3000, stream=56, products=4400),  # H100 SXM
    (10, 0): Rates(memory=7200, stream=60, products=9100),  # B200
}
HOPPER = RATES[9, 0]

WIDE_ROWS = 128  # matrix rows of an item: one tile of keys in shared memory serves them all
GPU_PIECE_KEYS = 128  # a tile of keys
HALF_BYTES = 2
# Assumed, in ns: a unit's queries, its first tile and its results, as far as the units beside it do
# not hide them; and the launches of a call that is replayed from a CUDA graph.
GPU_UNIT = 300.0
GPU_CALL = 3000.0
# From cuts that leave workers idle, where memory is the limit anyway, to those that balance best.
GPU_WAVES = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6)


def of_gpu(multiprocessors: int, heads: Heads, rates: Rates = HOPPER) -> DecodeCosts:
    """Costs in ns, for keys of 2 bytes an element. A multiprocessor takes one head of an item.

    Partial results go through L2, at twice the memory's rate.
    """
    group = max(1, heads.query // heads.kv)
    key_bytes = 2 * heads.dim * HALF_BYTES
    partial_bytes = 2 * group * (heads.dim * HALF_BYTES + 4)  # with a float32 log-sum-exp
    return DecodeCosts(
        workers=multiprocessors,
        kv_heads=heads.kv,
        group=group,
        tile_rows=max(1, WIDE_ROWS // group),
        piece_keys=GPU_PIECE_KEYS,
        piece_keys_per_row=0,
        fetch=key_bytes / rates.stream,
        product=4 * 64 * heads.dim / rates.products,
        row=0,
        unit=GPU_UNIT,
        memory=key_bytes / rates.memory,
        partial=partial_bytes / (2 * rates.memory),
        call=GPU_CALL,
        waves=GPU_WAVES,
    )


def of_device(device: torch.device, heads: Heads | None = None) -> DecodeCosts:
    """Of a device as it is: a CPU with torch's threads, or a GPU, of unknown kind as of a Hopper.

    heads: of the calls, which decide how a GPU's work is cut; default: Heads().
    """
    if device.type != "cuda":
        return of_cpu(torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    rates = RATES.get((properties.major, properties.minor), HOPPER)
    return of_gpu(properties.multi_processor_count, heads or Heads(), rates)
