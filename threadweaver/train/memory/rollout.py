"""The bytes of an engine while it decodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from threadweaver.generate.pool_size import PageNeeds
from threadweaver.generate.settings import EngineSizes
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import output_layer, trie_hidden_states
from threadweaver.train.memory.blueprint import Architecture, counting
from threadweaver.train.memory.first_layers import of_all_layers
from tw_kernels import Trie


@dataclass(frozen=True)
class EngineUse:
    """What decides how much an engine holds.

    Attributes:
        sizes: its settings.
        parameters: dtype of the model's.
        autocast: whether it computes, and keeps keys and values, in bfloat16 whatever that dtype.
        on_gpu: whether it is for a GPU.
        adapters: whether those of the architecture are beside its weights; else they are merged.
    """

    sizes: EngineSizes
    parameters: torch.dtype
    autocast: bool
    on_gpu: bool
    adapters: bool = True


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of an engine.

    Attributes:
        parameters: of the model, which a trainer may hold already; and buffers.
        copies: of its weights.
        pages: what the number of KV pages follows from.
        step: what the largest prefill takes while it runs, and the logits of all sequences.
    """

    parameters: int
    copies: int
    pages: PageNeeds
    step: int


def count_engine(architecture: Architecture, use: EngineUse) -> EngineBytes:
    """Counts an engine and its largest step."""
    if not use.adapters:
        architecture = replace(architecture, lora=None)
    sizes = use.sizes
    tokens = sizes.max_batch_tokens
    trie = Trie.from_paths([[0] * tokens])
    layout = trie.layout("cpu")
    with counting(architecture, use.parameters, use.on_gpu) as blueprint, torch.no_grad():
        live, model = blueprint.live, blueprint.model
        parameters = live.now
        pages = PageNeeds.of(model, sizes, use.autocast)
        weights = EngineWeights(model, torch.bfloat16 if use.autocast else None)
        weights.cast()
        held = live.now

        def run() -> _Step:
            live.reset_peak()
            with torch.autocast("cpu", torch.bfloat16, enabled=use.autocast):
                hidden = trie_hidden_states(weights.model, trie, layout)
                last = hidden[: sizes.max_sequences]
                output_layer(weights.model)(last).float().log_softmax(-1)
            return _Step(live.peak - held)

        step = of_all_layers(weights.model, True, run).bytes
        return EngineBytes(parameters, held - parameters, pages, step)


@dataclass(frozen=True)
class _Step:
    bytes: int
