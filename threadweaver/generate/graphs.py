"""Steps as CUDA graphs: one launch for all kernels of a step, the draws among them.

Steps are padded to few capacities, each of which is captured once: new tokens and work items up to
powers of two, pages up to those of the pool, partial results up to twice as many as a step of the
capacity ever had. Neither pages nor partial results that are not there cost time; items do, since
a GPU starts a block for each and KV head, but for the few that it starts all at once.
So the steps of a long run come back to the same graphs. Padding rows attend to nothing, write
nothing, and what is drawn for them is never read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from threadweaver.generate.inputs import StepInputs
from tw_kernels import DecodePlan, PlanSizes
from tw_kernels.cuda_graphs import without_waits

MAX_GRAPHS = 64
# Steps of more new tokens are bound by arithmetic, and what they launch is hidden behind it.
MOST_TOKENS = 256

# Work items of the smallest capacity: with 8 KV heads 512 blocks, four on each multiprocessor of an
# H100, which start at once.
LEAST_ITEMS = 64
# Partial results of a row of the smallest capacity: one for each run of pages on its path.
LEAST_SLOTS = 16

# The inputs of a step -> packed draws, int32 [S, 3]; launches the same kernels whatever they hold.
Forward = Callable[[StepInputs], Tensor]
# Records a call; returns what runs it again, and the tensor that it then fills. Raises
# WaitsForDevice for a call that cannot be recorded, and leaves the device fit for others.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
# A plan on the CPU for the given capacity, or for none.
Build = Callable[[PlanSizes | None], DecodePlan]


class Key(NamedTuple):
    """What tells graphs apart."""

    tokens: int
    items: int
    truncates: bool


@dataclass
class _Graph:
    """A captured step.

    Attributes:
        inputs: what the graph reads, on the device.
        staging: two on the host, taken in turns: while the device may still read one of a step, the
            other of the next step is filled.
        packed: what it writes, int32 [S, 3].
    """

    inputs: StepInputs
    staging: list[StepInputs]
    replay: Callable[[], None]
    packed: Tensor


class StepGraphs:
    """Runs steps of at most MOST_TOKENS new tokens, padded.

    Args:
        capture: records a call (`CudaCapture`).
        num_pages: of the pool.
        most_samples: no step draws more tokens.
    """

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        num_pages: int,
        most_samples: int,
        device: torch.device,
    ):
        self._forward = forward
        self._capture = capture
        self._num_pages = num_pages
        self._most_samples = power_of_two(most_samples)
        self._device = device
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._slots: dict[tuple[int, int], int] = {}  # by tokens and items
        self._last: dict[int, PlanSizes] = {}  # by tokens

    def plan(self, build: Build, tokens: int) -> DecodePlan:
        """A plan of so many new tokens for one of the capacities, in the rule with one build."""
        rows = power_of_two(tokens)
        if (likely := self._last.get(rows)) is not None:
            try:
                plan = build(likely)
            except ValueError:  # it does not fit; or it is no plan, as the next build says
                plan = None
            if plan is not None and _items(plan.size) == likely.items:
                return plan
        capacity = self._last[rows] = self._capacity(build(None).size)
        return build(capacity)

    def _capacity(self, size: PlanSizes) -> PlanSizes:
        rows, items = power_of_two(size.rows), _items(size)
        slots = self._slots.setdefault((rows, items), LEAST_SLOTS * rows)
        if slots < size.slots:
            slots = self._slots[rows, items] = power_of_two(2 * size.slots)
        return PlanSizes(rows, self._num_pages, items, slots)

    def stage(self, plan: DecodePlan, truncates: bool) -> StepInputs:
        """Host memory for the inputs of the next step, its plan already in it.

        Raises:
            WaitsForDevice: the step cannot be captured.
        """
        key = Key(plan.capacity.rows, plan.capacity.items, truncates)
        graph = self._graphs.get(key)
        if graph is None or graph.inputs.plan.capacity != plan.capacity:
            graph = self._new_graph(key, plan)
        self._graphs.move_to_end(key)
        graph.staging.reverse()
        staged = graph.staging[0]
        staged.take_plan(plan)
        return staged

    def launch(self, staged: StepInputs, tokens: int, drawn: Tensor | None = None) -> Tensor:
        """Packed draws [S, 3] on the device, padded; overwritten by the next launch.

        Args:
            tokens: how many ids are no padding.
            drawn: what the ids are places in, if they are no tokens (`StepInputs.take_drawn`).
        """
        capacity = staged.plan.capacity
        graph = self._graphs[Key(capacity.rows, capacity.items, staged.rows.truncates)]
        graph.inputs.take(staged)
        graph.inputs.take_drawn(tokens, drawn)
        graph.replay()
        return graph.packed

    def _new_graph(self, key: Key, plan: DecodePlan) -> _Graph:
        tokens = plan.capacity.rows
        samples = min(tokens, self._most_samples)
        shape = tokens, samples, plan, key.truncates
        inputs = StepInputs.empty(*shape, device=self._device)
        pinned = self._device.type == "cuda"
        staging = [StepInputs.empty(*shape, pinned=pinned) for _ in range(2)]
        staging[0].take_plan(plan)
        inputs.take(staging[0])
        replay, packed = self._capture(lambda: self._forward(inputs))
        # One that is replaced may have been running until now, when the device has been waited for.
        self._graphs.pop(key, None)
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._graphs[key] = _Graph(inputs, staging, replay, packed)
        return graph


def _items(size: PlanSizes) -> int:
    return max(LEAST_ITEMS, power_of_two(size.items))


def power_of_two(n: int) -> int:
    """The least that is not below n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


class CudaCapture:
    """Captures calls on the current CUDA device; all of them share the memory of what they compute,
    so that only one may run at a time. WaitsForDevice is raised before anything is captured."""

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if not self._graphs:
            # PyTorch refuses a pool whose graphs are all gone while anything lies in it, and what
            # cuBLAS works in on the stream of captures stays in the pool of the first one.
            self._pool = torch.cuda.graph_pool_handle()
        if self._streams is None:
            # For good: cuBLAS keeps up to 32 MiB for each stream. And of this capture alone: some
            # versions of PyTorch free that of a stream with any graph that was captured on it.
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        warm_up, stream = self._streams
        warm_up.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(warm_up):
                call()  # which may wait, once: it compiles and loads kernels
                with without_waits():
                    call()
        finally:
            torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = call()
        self._graphs.add(graph)
        return graph.replay, output
