"""The model's side of a step: its KV pages, and one forward pass over the new tokens of a batch."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.generate.pages import Copy
from threadweaver.generate.scheduler import Batch
from threadweaver.model import PagedStep, output_layer, paged_hidden_states
from tw_kernels import DecodePlan, PagedKV


class Runner:
    """Keys and values of every layer in pages, and the model that fills and reads them.

    The memory of the pages is taken by the first step after `free`, or after the start.

    Args:
        model: loaded by threadweaver.model; its weights are read where they are at every step.
        share: False reads a shared page once for every sequence that holds it, for comparison.

    Attributes:
        seconds: time spent on "plan", "model" and, within the model, "attention"; on CUDA the last
            is 0, and times are those of the host.
    """

    def __init__(self, model: PreTrainedModel, num_pages: int, page_size: int, share: bool = True):
        self.model = model
        self.page_size = page_size
        self.share = share
        self.seconds = {"plan": 0.0, "model": 0.0, "attention": 0.0}
        self._num_pages = num_pages
        self._pages: Tensor | None = None
        self._caches: list[PagedKV] = []

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [S, V] of the last new token of each sequence that has nothing pending after it,
        in the order of the batch."""
        start = time.perf_counter()
        caches = self._allocate()
        self._copy(batch.copies)
        step = PagedStep(caches, self._plan(batch))
        planned = time.perf_counter()
        ids, positions, last = _inputs(batch)
        device = self.model.device
        # Evaluation mode, which the trainer's own next step ends.
        if self.model.training:
            self.model.eval()
        hidden = paged_hidden_states(self.model, ids.to(device), positions.to(device), step)
        logits = output_layer(self.model)(hidden[last.to(device)])
        self.seconds["plan"] += planned - start
        self.seconds["model"] += time.perf_counter() - planned
        self.seconds["attention"] += step.attention_seconds
        return logits

    def free(self) -> None:
        """Gives the memory of the pages back; what they held is lost."""
        self._pages, self._caches = None, []

    def _allocate(self) -> list[PagedKV]:
        if self._pages is None:
            shape = kv_shape(self.model, self._num_pages, self.page_size)
            self._pages = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
            self._caches = [PagedKV(k, v) for k, v in self._pages]
        return self._caches

    def _copy(self, copies: list[Copy]) -> None:
        if copies and self._pages is not None:
            source, target, _ = torch.tensor(copies, device=self._pages.device).unbind(1)
            self._pages[:, :, target] = self._pages[:, :, source]

    def _plan(self, batch: Batch) -> DecodePlan:
        tables = [s.table for s in batch.sequences]
        return DecodePlan.build(
            [np.frombuffer(table.pages, np.int32) for table in tables],
            [table.length for table in tables],
            batch.counts,
            self.page_size,
            self.model.device,
            share=self.share,
        )


def kv_shape(model: PreTrainedModel, num_pages: int, page_size: int) -> tuple[int, ...]:
    """[layers, 2 (keys, values), num_pages, page_size, Hkv, D]."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, 2, num_pages, page_size, heads, head_dim


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
