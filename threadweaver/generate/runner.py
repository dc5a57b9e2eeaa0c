"""The model's side of a step: its KV pages, and one forward pass over the new tokens of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.generate.graphs import Capture, DecodeGraphs, cuda_capture, padded
from threadweaver.generate.pages import Copy
from threadweaver.generate.scheduler import Batch
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import PagedStep, kv_shape, output_layer, paged_hidden_states
from tw_kernels import DecodePlan, PagedKV
from tw_kernels.decode.costs import Heads, of_device

# A step takes one CPU thread for each THREAD_WORK multiply-adds of its largest product, where
# fetching a weight counts as much as FETCH_ROWS rows. Below it two threads take as long as one, or
# longer, and other processes on the machine slow them down (a model with matrices of 98,000
# weights: 1.1 to 1.3 times as long at 1 to 16 tokens, even at 64; with 885,000 weights 0.7 at one
# token; two Xeon cores, with AVX-512 and held to AVX2).
THREAD_WORK = 4e6
FETCH_ROWS = 16


class Runner:
    """Keys and values of every layer in pages, and the model that fills and reads them.

    The memory of the pages is taken by the first step after `free`, or after the start.

    Args:
        model: loaded by threadweaver.model. Its weights are read in place, or as copies that `cast`
            brings up to date (EngineWeights).
        capture: records the graphs in which steps of one new token a sequence run; None: no
            graphs. Default: CUDA graphs on CUDA.
        autocast: compute, and keep keys and values, in bfloat16 whatever the dtype of the weights,
            as a trainer does under torch.autocast.

    Attributes:
        seconds: time spent on "plan", "model" and, within the model, "attention"; on CUDA the last
            is 0, and times are those of the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_pages: int,
        page_size: int,
        capture: Capture | Literal["default"] | None = "default",
        autocast: bool = False,
    ):
        self._weights = EngineWeights(model, torch.bfloat16 if autocast else None)
        self._output = output_layer(self._weights.model)
        self.page_size = page_size
        self.seconds = {"plan": 0.0, "model": 0.0, "attention": 0.0}
        self._num_pages = num_pages
        self._pages: Tensor | None = None
        self._caches: list[PagedKV] = []
        self._device = model.device  # model.device goes through all parameters
        self._dtype = torch.bfloat16 if autocast else model.dtype
        if capture == "default":
            capture = cuda_capture if self._device.type == "cuda" else None
        self._capture = capture
        self._autocast = autocast
        layers = model.base_model.parameters()
        embedding = model.get_input_embeddings().weight
        self._largest_matrix = max(p.numel() for p in layers if p is not embedding)
        self._graphs: DecodeGraphs | None = None
        config = self._weights.model.config.get_text_config()
        *_, kv_heads, head_dim = kv_shape(self._weights.model, num_pages, page_size)
        self._heads = Heads(config.num_attention_heads, kv_heads, head_dim)

    def cast(self) -> None:
        """Takes the model's weights as they are now for all steps until it is called again."""
        self._weights.cast()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [S, V] of the last new token of each sequence that has nothing pending after it,
        in the order of the batch."""
        start = time.perf_counter()
        self._allocate()
        self._copy(batch.copies)
        decodes = max(batch.counts) == 1 and not any(s.pending for s in batch.sequences)
        graphs = self._graphs if decodes else None
        ids, positions, last = (x.to(self._device) for x in _inputs(batch))
        with self._threads(len(ids)):
            plan = self._plan(batch, in_graph=graphs is not None)
            planned = time.perf_counter()
            if graphs is None:
                logits = self._logits(ids, positions, plan, last)
            else:
                logits = graphs(ids, positions, plan)
        self.seconds["plan"] += planned - start
        self.seconds["model"] += time.perf_counter() - planned
        return logits

    def _logits(
        self, ids: Tensor, positions: Tensor, plan: DecodePlan, last: Tensor | None = None
    ) -> Tensor:
        """Logits of the new tokens `last`, by default of all."""
        step, model = PagedStep(self._caches, plan), self._weights.model
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            hidden = paged_hidden_states(model, ids, positions, step)
            logits = self._output(hidden if last is None else hidden[last])
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

    def _allocate(self) -> None:
        if self._pages is None:
            shape = kv_shape(self._weights.model, self._num_pages, self.page_size)
            self._pages = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._caches = [PagedKV(k, v) for k, v in self._pages]
            if self._capture is not None:
                self._graphs = DecodeGraphs(self._logits, self._capture)

    def _copy(self, copies: list[Copy]) -> None:
        if copies and self._pages is not None:
            source, target, _ = torch.tensor(copies, device=self._pages.device).unbind(1)
            self._pages[:, :, target] = self._pages[:, :, source]

    def _plan(self, batch: Batch, in_graph: bool) -> DecodePlan:
        tables = [s.table for s in batch.sequences]
        sequences = (
            [np.frombuffer(table.pages, np.int32) for table in tables],
            [table.length for table in tables],
            batch.counts,
            self.page_size,
        )
        costs = of_device(self._device, self._heads)
        if not in_graph:
            return DecodePlan.build(*sequences, self._device, costs=costs)
        # Cut by the same costs as the plan on the device, so that the sizes agree.
        size = DecodePlan.build(*sequences, costs=costs).size
        return DecodePlan.build(*sequences, self._device, capacity=padded(size), costs=costs)


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions of the new tokens [T], and which of them give logits [S]; int64."""
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        end = sequence.table.length
        ids += sequence.ids[end - count : end]
        positions += range(end - count, end)
        if end == len(sequence.ids):
            last.append(len(ids) - 1)
    return torch.tensor(ids), torch.tensor(positions), torch.tensor(last, dtype=torch.int64)
