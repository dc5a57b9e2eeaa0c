"""The bytes of an engine while it decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from threadweaver.generate.runner import kv_page_bytes
from threadweaver.generate.settings import EngineSizes
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import output_layer, trie_hidden_states
from threadweaver.train.memory.blueprint import Architecture, counting
from tw_kernels import Trie


@dataclass(frozen=True)
class EngineUse:
    """What decides how much an engine holds.

    Attributes:
        sizes: its settings.
        parameters: dtype of the model's.
        autocast: whether it computes, and keeps keys and values, in bfloat16 whatever that dtype.
        on_gpu: whether it is for a GPU.
    """

    sizes: EngineSizes
    parameters: torch.dtype
    autocast: bool
    on_gpu: bool


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of an engine.

    Attributes:
        parameters: of the model, which a trainer may hold already; and buffers.
        copies: of its weights.
        kv_pages: all of them. On a CPU a page takes memory only once it is written.
        step: what the largest prefill takes while it runs, and the logits of all sequences.
    """

    parameters: int
    copies: int
    kv_pages: int
    step: int


def count_engine(architecture: Architecture, use: EngineUse) -> EngineBytes:
    """Counts an engine and its largest step."""
    sizes = use.sizes
    tokens = sizes.max_batch_tokens
    trie = Trie.from_paths([[0] * tokens])
    layout = trie.layout("cpu")
    with counting(architecture, use.parameters, use.on_gpu) as blueprint, torch.no_grad():
        live, model = blueprint.live, blueprint.model
        parameters = live.now
        page_bytes = kv_page_bytes(model, sizes.page_size, use.autocast)
        kv_pages = int(sizes.kv_gigabytes * 1e9 / page_bytes) * page_bytes
        weights = EngineWeights(model, torch.bfloat16 if use.autocast else None)
        weights.cast()
        held = live.now
        live.reset_peak()
        with torch.autocast("cpu", torch.bfloat16, enabled=use.autocast):
            hidden = trie_hidden_states(weights.model, trie, layout)
            last = hidden[: sizes.max_sequences]
            output_layer(weights.model)(last).float().log_softmax(-1)
        return EngineBytes(parameters, held - parameters, kv_pages, live.peak - held)
