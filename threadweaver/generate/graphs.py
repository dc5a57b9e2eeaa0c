"""Decode steps as CUDA graphs: one launch for all kernels of a step.

A graph is captured for each capacity that plans are padded to, in powers of two, so there are few.
A step of that capacity is copied into the graph's buffers and replayed. Padding rows attend to
nothing and write nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tw_kernels import DecodePlan, PlanSizes

MAX_GRAPHS = 32
WARM_UP_CALLS = 2

# (ids [R], positions [R], plan) -> logits [R, V]
Forward = Callable[[Tensor, Tensor, DecodePlan], Tensor]
# Records a call; returns what runs it again, and the tensor that it then fills.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@dataclass
class _Graph:
    ids: Tensor
    positions: Tensor
    plan: DecodePlan
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """Runs a forward pass over padded steps, each capacity captured once.

    Args:
        forward: launches the same kernels whatever its arguments hold.
        capture: records a call (`cuda_capture`).
    """

    def __init__(self, forward: Forward, capture: Capture):
        self._forward = forward
        self._capture = capture
        self._graphs: OrderedDict[PlanSizes, _Graph] = OrderedDict()

    def __call__(self, ids: Tensor, positions: Tensor, plan: DecodePlan) -> Tensor:
        """Logits [S, V] of S new tokens, one a sequence; overwritten by the next call.

        Args:
            ids, positions: int64 [S].
            plan: of these tokens, with the capacity that `padded` gives for it.
        """
        graph = self._graphs.get(plan.capacity)
        if graph is None:
            graph = self._new_graph(plan)
        self._graphs.move_to_end(plan.capacity)
        graph.ids[: len(ids)].copy_(ids, non_blocking=True)
        graph.positions[: len(ids)].copy_(positions, non_blocking=True)
        graph.plan.copy_(plan)
        graph.replay()
        return graph.logits[: len(ids)]

    def _new_graph(self, plan: DecodePlan) -> _Graph:
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        device, rows = plan.buffer.device, plan.capacity.rows
        ids, positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        # The graph reads this copy; later plans are copied into it.
        own = DecodePlan(
            plan.buffer.clone(),
            plan.page_size,
            plan.tile_rows,
            plan.num_pages,
            plan.size,
            plan.capacity,
        )
        replay, logits = self._capture(lambda: self._forward(ids, positions, own))
        graph = self._graphs[plan.capacity] = _Graph(ids, positions, own, replay, logits)
        return graph


def padded(size: PlanSizes) -> PlanSizes:
    """The capacity for a plan of this size: each number up to a power of two."""
    return PlanSizes(*(1 << max(0, n - 1).bit_length() for n in size))


def cuda_capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Captures a call on the current CUDA device, after a few warm-up calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output
