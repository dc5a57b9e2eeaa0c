"""The model's side of a step: its KV pages, one forward pass over the new tokens of a batch, and a
token drawn for each sequence that is complete.

A step has three parts, so that a GPU works while the host thinks of the next:

    step = runner.plan(batch, …)        what needs no token: plan, positions, where draws go
    runner.launch(step)                 token ids; does not wait for the device
    draws = runner.read(step)           waits

The next step may be launched before that one is read: its ids are then what the device drew.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.generate.constraint import Constraint, constrained
from threadweaver.generate.graphs import MOST_TOKENS, Capture, CudaCapture, StepGraphs
from threadweaver.generate.inputs import StepInputs
from threadweaver.generate.pages import Copy
from threadweaver.generate.scheduler import Batch, Sequence
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import PagedStep, kv_shape, output_layer, paged_hidden_states
from tw_kernels import DecodePlan, PagedKV, PlanSizes
from tw_kernels.cuda_graphs import WaitsForDevice
from tw_kernels.decode.costs import Heads, of_device
from tw_kernels.decode.op import TRIE_DECODE, choose_backend
from tw_kernels.sampling import Draws, SamplingRows, sample_tokens

# A step takes one CPU thread for each THREAD_WORK multiply-adds of its largest product, where
# fetching a weight counts as much as FETCH_ROWS rows. Below it two threads take as long as one, or
# longer, and other processes on the machine slow them down (a model with matrices of 98,000
# weights: 1.1 to 1.3 times as long at 1 to 16 tokens, even at 64; with 885,000 weights 0.7 at one
# token; two Xeon cores, with AVX-512 and held to AVX2).
THREAD_WORK = 4e6
FETCH_ROWS = 16


@dataclass
class Counts:
    """What steps cost beside their kernels.

    Attributes:
        steps: launched.
        captures: graphs captured; in a steady state none.
        copies_to_device, copies_to_host: one each a step, and one more to the device where pages
            are copied.
        casts: of all weights; one for a batch of rollouts.
    """

    steps: int = 0
    captures: int = 0
    copies_to_device: int = 0
    copies_to_host: int = 0
    casts: int = 0


@dataclass
class Step:
    """One step between its plan and its draws.

    Attributes:
        sequences: those that it draws a token for, in the order of its draws.
        inputs: on the host; the ids are filled in at the launch.
        in_graph: whether it is padded for a graph.
        constraints: of the sequences, if there are any.
        drawn: what was drawn, int32 [S, 3] or padded, on the device; None until it is launched. The
            next launch may overwrite it.
        packed: the same on the host, once `arrived` has happened.
    """

    batch: Batch
    sequences: list[Sequence]
    inputs: StepInputs
    in_graph: bool
    constraints: list[Constraint | None]
    drawn: Tensor | None = None
    packed: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class Runner:
    """Keys and values of every layer in pages, and the model that fills and reads them.

    The memory of the pages is taken by the first step after `free`, or after the start.

    Args:
        model: loaded by threadweaver.model. Its weights are read in place, or as copies that `cast`
            brings up to date (EngineWeights).
        capture: records the graphs in which steps of few new tokens run, if its attention can be
            captured; None: no graphs. Default: CUDA graphs on CUDA. If a step of the model turns
            out to wait for the device, a line on stderr says so, and steps run without graphs from
            then on.
        autocast: compute, and keep keys and values, in bfloat16 whatever the dtype of the weights,
            as a trainer does under torch.autocast.
        max_sequences: no step draws more tokens.

    Attributes:
        num_pages: that the next step which takes their memory takes.
        overlaps: whether steps of few new tokens run in graphs, so that `launch` returns before
            they are done.
        counts: of all steps so far.
        seconds: time spent on "plan", "model" and, within the model, "attention", and "sampling".
            With graphs the last two are 0 and draws are part of the model, which is what the host
            waits for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_pages: int,
        page_size: int,
        capture: Capture | Literal["default"] | None = "default",
        autocast: bool = False,
        max_sequences: int = 64,
    ):
        self._weights = EngineWeights(model, torch.bfloat16 if autocast else None)
        self._output = output_layer(self._weights.model)
        self.page_size = page_size
        self.counts = Counts()
        self.seconds = {"plan": 0.0, "model": 0.0, "attention": 0.0, "sampling": 0.0}
        self.num_pages = num_pages
        self._pages: Tensor | None = None
        self._caches: list[PagedKV] = []
        self._device = model.device  # model.device goes through all parameters
        self._dtype = _kv_dtype(model, autocast)
        if capture == "default":
            capture = CudaCapture() if self._device.type == "cuda" else None
        self._capture = capture
        self._autocast = autocast
        self._max_sequences = max_sequences
        layers = model.base_model.parameters()
        embedding = model.get_input_embeddings().weight
        self._largest_matrix = max(p.numel() for p in layers if p is not embedding)
        self._graphs: StepGraphs | None = None
        config = self._weights.model.config.get_text_config()
        *_, kv_heads, head_dim = kv_shape(self._weights.model, num_pages, page_size)
        self._heads = Heads(config.num_attention_heads, kv_heads, head_dim)
        self.overlaps = capture is not None and self._attention_can_be_captured()

    @property
    def bytes_to_copy(self) -> int:
        """What `cast` takes that is not there yet."""
        return self._weights.bytes_to_copy

    @property
    def holds_pages(self) -> bool:
        return self._pages is not None

    def cast(self) -> None:
        """Takes the model's weights as they are now for all steps until it is called again."""
        self._weights.cast()
        self.counts.casts += 1

    @torch.inference_mode()
    def plan(
        self,
        batch: Batch,
        sequences: list[Sequence],
        rows: SamplingRows,
        constraints: list[Constraint | None],
    ) -> Step:
        """Prepares a step, whose pages are taken.

        Args:
            sequences: those of the batch that have nothing pending after it, in its order.
            rows: on the CPU, of these.
            constraints: of these; with one of them the step runs in no graph.
        """
        start = time.perf_counter()
        self._allocate()
        tokens, samples = sum(batch.counts), len(rows.data)
        constraints = constraints if any(c is not None for c in constraints) else []
        staged = None
        with self._threads(tokens):
            if self.overlaps and tokens <= MOST_TOKENS and not constraints:
                staged = self._stage(batch, tokens, rows.truncates)
            if (inputs := staged) is None:
                plan = self._decode_plan(batch, None)
                pinned = self._device.type == "cuda"
                inputs = StepInputs.empty(tokens, samples, plan, rows.truncates, pinned=pinned)
                inputs.take_plan(plan)
        positions, last = _positions(batch, samples)
        inputs.positions[:tokens] = positions
        inputs.last[:samples] = last
        inputs.rows.data[:samples] = rows.data
        self.seconds["plan"] += time.perf_counter() - start
        return Step(batch, sequences, inputs, staged is not None, constraints)

    @torch.inference_mode()
    def launch(self, step: Step, after: Step | None = None) -> None:
        """Computes a step; `read` gives what it drew.

        Args:
            after: the step launched last, if it is not read yet: one that draws the only new token
                of every sequence.
        """
        start = time.perf_counter()
        if after is None:
            ids, drawn = _ids(step.batch), None
        else:
            ids, drawn = _places(step.batch, after), after.drawn
        step.inputs.ids[: len(ids)] = ids
        self._copy(step.batch.copies)
        if self._graphs is not None and step.in_graph:
            packed = self._graphs.launch(step.inputs, len(ids), drawn)
            self.seconds["model"] += time.perf_counter() - start
        else:
            inputs = step.inputs
            if self._device.type != "cpu":
                buffer = inputs.buffer.to(self._device, non_blocking=True)
                shape = len(ids), len(step.sequences), inputs.plan, inputs.rows.truncates
                inputs = StepInputs(buffer, *shape)
            inputs.take_drawn(len(ids), drawn)
            with self._threads(len(ids)):
                logits = self._logits(inputs)
            computed = time.perf_counter()
            logits = constrained(logits, step.constraints)
            packed = sample_tokens(logits, inputs.rows)
            self.seconds["model"] += computed - start
            self.seconds["sampling"] += time.perf_counter() - computed
        self.counts.steps += 1
        self.counts.copies_to_device += 1
        step.drawn = packed
        shape = len(step.sequences), packed.shape[1]
        step.packed = torch.empty(shape, dtype=torch.int32, pin_memory=packed.is_cuda)
        step.packed.copy_(packed[: len(step.sequences)], non_blocking=True)
        if packed.is_cuda:
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        self.counts.copies_to_host += 1

    def read(self, step: Step) -> Draws:
        """What a launched step drew, on the CPU, in the order of its rows."""
        assert step.packed is not None
        start = time.perf_counter()
        if step.arrived is not None:
            step.arrived.synchronize()
        self.seconds["model"] += time.perf_counter() - start
        return Draws.unpack(step.packed)

    def _stage(self, batch: Batch, tokens: int, truncates: bool) -> StepInputs | None:
        """Inputs of a step for its graph, with its plan; None if it cannot be captured."""
        assert self._graphs is not None
        plan = self._graphs.plan(lambda room: self._decode_plan(batch, room), tokens)
        try:
            return self._graphs.stage(plan, truncates)
        except WaitsForDevice:
            self.overlaps = False  # the graphs there are stay until `free`: one may be running
        family = self._weights.model.config.model_type
        note = f"{family}: its layers wait for the device: steps run without CUDA graphs"
        print(f"warning: {note}", file=sys.stderr, flush=True)
        return None

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Packed draws of a step."""
        return sample_tokens(self._logits(inputs), inputs.rows)

    def _logits(self, inputs: StepInputs) -> Tensor:
        """Logits [S, V] of the new tokens `last`."""
        step, model = PagedStep(self._caches, inputs.plan), self._weights.model
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            hidden = paged_hidden_states(model, inputs.ids, inputs.positions, step)
            logits = self._output(hidden[inputs.last])
        self.seconds["attention"] += step.attention_seconds
        return logits

    @contextmanager
    def _threads(self, tokens: int) -> Iterator[None]:
        """Limits torch to as many CPU threads as a pass over so many tokens fills; does nothing
        for a model on a GPU."""
        if self._device.type != "cpu":
            yield
            return
        most = torch.get_num_threads()
        filled = int((tokens + FETCH_ROWS) * self._largest_matrix / THREAD_WORK)
        torch.set_num_threads(min(max(1, filled), most))
        try:
            yield
        finally:
            torch.set_num_threads(most)

    def free(self) -> None:
        """Gives the memory of the pages and of copied weights back; what they held is lost."""
        self._pages, self._caches, self._graphs = None, [], None
        self._weights.free()
        # PyTorch would make others' tensors of the pages' memory, and while one of them stays
        # there, moments say, the pages do not fit in it again.
        torch.cuda.empty_cache()

    def _allocate(self) -> None:
        if self._pages is None:
            shape = kv_shape(self._weights.model, self.num_pages, self.page_size)
            self._pages = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._caches = [PagedKV(k, v) for k, v in self._pages]
            if self.overlaps:
                self._graphs = StepGraphs(
                    self._forward,
                    self._captured,
                    self.num_pages,
                    self._max_sequences,
                    self._device,
                )

    def _attention_can_be_captured(self) -> bool:
        heads, kv_heads, head_dim = self._heads
        q = torch.empty(1, heads, head_dim, dtype=self._dtype, device=self._device)
        pages = q.new_empty(1, self.page_size, kv_heads, head_dim)
        return TRIE_DECODE[choose_backend(q, PagedKV(pages, pages))].CAN_BE_CAPTURED

    def _captured(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        assert self._capture is not None
        captured = self._capture(call)
        self.counts.captures += 1
        return captured

    def _copy(self, copies: list[Copy]) -> None:
        if copies and self._pages is not None:
            pairs = torch.tensor([copy[:2] for copy in copies])
            if self._device.type == "cuda":
                pairs = pairs.pin_memory().to(self._device, non_blocking=True)
            source, target = pairs.unbind(1)
            self._pages[:, :, target] = self._pages[:, :, source]
            self.counts.copies_to_device += 1

    def _decode_plan(self, batch: Batch, capacity: PlanSizes | None) -> DecodePlan:
        """On the CPU, cut as suits the device."""
        tables = [s.table for s in batch.sequences]
        return DecodePlan.build(
            [np.frombuffer(table.pages, np.int32) for table in tables],
            [table.length for table in tables],
            batch.counts,
            self.page_size,
            capacity=capacity,
            costs=of_device(self._device, self._heads),
        )


def kv_page_bytes(model: PreTrainedModel, page_size: int, autocast: bool) -> int:
    """Bytes of a page of `Runner`: its keys and values in all layers."""
    shape = kv_shape(model, 1, page_size)
    return math.prod(shape) * _kv_dtype(model, autocast).itemsize


def _kv_dtype(model: PreTrainedModel, autocast: bool) -> torch.dtype:
    return torch.bfloat16 if autocast else model.dtype


def _ids(batch: Batch) -> Tensor:
    """Of the new tokens, int64 [T]."""
    ids: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        end = sequence.table.length
        ids += sequence.ids[end - count : end]
    return torch.tensor(ids)


def _places(batch: Batch, after: Step) -> Tensor:
    """Of the batch's sequences among the draws of the step before it, int64 [T]."""
    place = {sequence: i for i, sequence in enumerate(after.sequences)}
    return torch.tensor([place[sequence] for sequence in batch.sequences])


def _positions(batch: Batch, samples: int) -> tuple[Tensor, Tensor]:
    """Positions of the new tokens [T], and which of them give logits [S]; int64."""
    positions: list[int] = []
    last: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        end = sequence.table.length
        positions += range(end - count, end)
        if sequence.pending <= 0:
            last.append(len(positions) - 1)
    assert len(last) == samples
    return torch.tensor(positions), torch.tensor(last, dtype=torch.int64)
