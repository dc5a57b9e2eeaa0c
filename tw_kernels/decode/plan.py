"""What a decode step reads and where it writes: pages of keys and values, and the plan of the step.

Data alone, which the op and its backends take.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_kernels import _C
from tw_kernels.decode.costs import DecodeCosts, of_device

PageTable = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values of one layer, in pages.

    A token at position p of a sequence lives in page table[p // page_size], slot p % page_size.

    Attributes:
        k_pages, v_pages: [num_pages, page_size, Hkv, D], equal strides, the last one 1; only
            num_pages may be 0.

    Raises:
        ValueError: shapes, strides, dtypes or devices of the two that differ, or an empty page.
    """

    k_pages: Tensor
    v_pages: Tensor

    def __post_init__(self) -> None:
        k, v = self.k_pages, self.v_pages
        if k.dim() != 4 or k.shape != v.shape:
            raise ValueError(
                "k_pages and v_pages must both be [num_pages, page_size, Hkv, D]; "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if 0 in k.shape[1:]:
            raise ValueError(f"page_size, Hkv and D must be at least 1; got {tuple(k.shape)}")
        if k.stride() != v.stride() or k.stride(-1) != 1:
            raise ValueError(
                "k_pages and v_pages must have equal strides, the last one 1; "
                f"got {k.stride()} and {v.stride()}"
            )
        if k.dtype != v.dtype or k.device != v.device:
            raise ValueError(
                "k_pages and v_pages must share dtype and device; "
                f"got {k.dtype} on {k.device} and {v.dtype} on {v.device}"
            )

    @property
    def num_pages(self) -> int:
        """Pages of the layer, free ones included."""
        return self.k_pages.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.k_pages.shape[1]


class PlanSizes(NamedTuple):
    """How much a plan holds, or has room for."""

    rows: int  # query rows, Q
    pages: int
    items: int
    slots: int  # partial results: rows of all items together


@dataclass(eq=False)
class DecodePlan:
    """What attends to what in one step; all layers of a model share it.

    A row is one new token. Rows stand in lineage order: sequences by preorder of the trie of their
    page tables, the new tokens of a sequence by position. An item is a piece of a run of pages with
    the contiguous rows below it; a row sees the keys whose position is not above its own, so each
    row gets every key of its sequence from exactly one item. Every item leaves one partial result
    (output, log-sum-exp) per row in a slot of its own.

    The tensors are int32 views of `buffer`, on the plan's device, padded to `capacity`: padding
    rows merge nothing (their output is 0) and write nowhere; padding items have no rows. What they
    hold is taken as `build` made it, and never checked again.

    Attributes:
        buffer: all of the following, so that a plan moves in one copy.
        rows: [Q], where each row stands in the caller's q, new_k, new_v and out.
        positions: [Q], position in its sequence; -1 for padding.
        slots: [Q], page * page_size + offset where its key and value go; -1 for padding.
        merge_ptr: [Q + 1]; row r merges partial slots merge_slots[merge_ptr[r]:merge_ptr[r + 1]].
        merge_slots: [partial slots], for each row by key position.
        items: [W, 6], in the order in which workers take them: index into `pages` of the first
            page, number of keys, position of the first key (which starts a page), first row, end
            row, partial slot of the first row (that of row r is r - first row further).
        pages: [P], the runs of pages, each run once.
        page_size: tokens a page.
        tile_rows: no item has more rows.
        num_pages: every page id is below it.
        size: what is not padding.
        predicted: time of a call by the costs that the plan was cut by (ns on a GPU): a model.
        memo: what backends derived from this plan and want to keep with it.

    Raises:
        ValueError: a buffer that is not int32 of the size that the capacity asks for.
    """

    buffer: Tensor
    page_size: int
    tile_rows: int
    num_pages: int
    size: PlanSizes
    capacity: PlanSizes
    predicted: float = 0.0
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rows, pages, items, slots = self.capacity
        sizes = [rows, rows, rows, rows + 1, slots, 6 * items, pages]
        if self.buffer.dtype != torch.int32 or self.buffer.shape != (sum(sizes),):
            raise ValueError(
                f"the buffer of a plan of this capacity is int32 [{sum(sizes)}], "
                f"got {self.buffer.dtype} {list(self.buffer.shape)}"
            )
        parts = self.buffer.split(sizes)
        self.rows, self.positions, self.slots, self.merge_ptr, self.merge_slots = parts[:5]
        self.items = parts[5].view(-1, 6)
        self.pages = parts[6]

    @classmethod
    def build(
        cls,
        page_tables: Sequence[PageTable] | np.ndarray | Tensor,
        lengths: Sequence[int] | np.ndarray | Tensor,
        new_tokens: Sequence[int] | np.ndarray | Tensor,
        page_size: int,
        device: torch.device | str = "cpu",
        num_workers: int | None = None,
        *,
        tile_rows: int | None = None,
        share: bool = True,
        capacity: PlanSizes | None = None,
        costs: DecodeCosts | None = None,
    ) -> DecodePlan:
        """Plans a step on the host, in O(pages + rows x runs on their path).

        Args:
            page_tables: one per sequence, a list, array or tensor of page ids, or all of them as
                rows of a matrix. Entries beyond ceil(length / page_size) are ignored. int32 arrays
                are read in place, lists cost a few nanoseconds an entry.
            lengths: tokens of each sequence, the new ones included.
            new_tokens: how many of them, the last ones, are queries of this step; at least 1.
            page_size: tokens a page.
            device: where the plan's tensors go.
            num_workers: in place of the costs' workers: threads of a CPU, multiprocessors of a GPU.
            tile_rows: in place of the costs': most rows of an item.
            share: False plans every sequence alone, as if no page had two readers.
            capacity: room for CUDA graphs: the tensors get these sizes whatever the step holds.
            costs: what decides how runs are cut (tw_kernels.decode.costs); default: of the device,
                and on a GPU of 32 query and 8 KV heads of 128.

        Raises:
            ValueError: lengths, counts, page ids or sizes out of range, a table too short, two
                sequences that write one page, or a step that exceeds the capacity; names the
                sequence.
            TypeError: tables, lengths, counts or sizes that are not integers.
        """
        device = torch.device(device)
        costs = costs or of_device(device)
        if num_workers is not None:
            costs = costs._replace(workers=_integer("num_workers", num_workers))
        if tile_rows is not None:
            costs = costs._replace(tile_rows=_integer("tile_rows", tile_rows))
        if capacity is not None:
            rooms = zip(PlanSizes._fields, PlanSizes(*capacity), strict=True)
            capacity = PlanSizes(*(_integer(f"capacity.{name}", n, least=0) for name, n in rooms))
        buffer, size, predicted = _C.decode_plan(
            _tables(page_tables),
            _integers("lengths", lengths),
            _integers("new_tokens", new_tokens),
            _integer("page_size", page_size),
            costs,
            bool(share),
            capacity,
        )
        size = PlanSizes(*size)
        room = capacity or size
        pages = buffer[buffer.size - room.pages :][: size.pages]
        num_pages = int(pages.max(initial=-1)) + 1
        tensor = torch.from_numpy(buffer)
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return cls(tensor, page_size, costs.tile_rows, num_pages, size, room, predicted)

    def copy_(self, plan: DecodePlan) -> None:
        """Takes over another plan of the same capacity, in place, as a CUDA graph needs.

        Raises:
            ValueError: capacity, page size or tile_rows differ.
        """
        ours = self.capacity, self.page_size, self.tile_rows
        if ours != (plan.capacity, plan.page_size, plan.tile_rows):
            raise ValueError(
                "only a plan of the same capacity, page_size and tile_rows can be copied: this one "
                f"has {ours}, the other {(plan.capacity, plan.page_size, plan.tile_rows)}"
            )
        self.buffer.copy_(plan.buffer, non_blocking=True)
        self.num_pages, self.size, self.predicted = plan.num_pages, plan.size, plan.predicted
        self.memo.clear()


def _integer(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"{name} must be in [{least}, 2^31), got {value}")
    return int(value)


def _integers(name: str, values: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    array = np.asarray(_numpy(name, values) if isinstance(values, Tensor) else values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return array


def _tables(
    tables: Sequence[PageTable] | np.ndarray | Tensor,
) -> np.ndarray | list[Sequence[int] | np.ndarray]:
    """The page tables without tensors."""
    if isinstance(tables, Tensor):
        tables = _numpy("page_tables", tables)
    if isinstance(tables, np.ndarray):
        if tables.ndim != 2:
            raise TypeError(
                "page_tables must be a matrix with a row a sequence, or a sequence of tables, "
                f"got shape {tables.shape}"
            )
        return tables
    return [
        _numpy(f"sequence {s}: a page table", table) if isinstance(table, Tensor) else table
        for s, table in enumerate(tables)
    ]


def _numpy(name: str, x: Tensor) -> np.ndarray:
    if x.is_floating_point() or x.is_complex():  # NumPy has not all of these dtypes
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    return x.numpy(force=True)
