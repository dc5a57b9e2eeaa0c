"""The attention of a Hugging Face decoder, replaced by `trie_attention` and `trie_decode`.

The model stays an unmodified `transformers` model: its layers find the function registered here
under the name `ATTENTION` in the library's AttentionInterface. A trie, or the new tokens of a batch
of sequences, go in as one packed row [1, N] with their `position_ids`; the trie's layout or the
step's plan travels beside them as a keyword argument.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tw_kernels import DecodePlan, PagedKV, Trie, TrieLayout, trie_attention, trie_decode

ATTENTION = "trie"


@dataclass
class PagedStep:
    """What the layers of a model share in one step of decoding or prefill.

    Attributes:
        caches: pages of keys and values, one for each layer.
        plan: of the step's new tokens.
        attention_seconds: time spent in attention so far; 0 on CUDA, where calls are asynchronous.
    """

    caches: list[PagedKV]
    plan: DecodePlan
    attention_seconds: float = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens [T, Hq, D] in one layer, whose new keys and values
        [T, Hkv, D] go to their pages."""
        start = time.perf_counter()
        out = trie_decode(q, self.caches[layer], self.plan, scale, new_k=k, new_v=v)
        if not out.is_cuda:
            self.attention_seconds += time.perf_counter() - start
        return out


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """AttentionInterface: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, D]."""
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__}: no dropout, soft cap or sinks in trie attention"
        )
    # Under autocast, norms and rotary embeddings leave queries and keys in float32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if (layout := kwargs.get("trie_layout")) is not None:
        return trie_attention(q, k, v, layout, scaling).unsqueeze(0), None
    if (step := kwargs.get("paged_step")) is not None:
        return step.attend(module.layer_idx, q, k, v, scaling).unsqueeze(0), None
    raise ValueError(
        "this model attends over a trie: call it with trie_layout=trie.layout(device), or load the "
        "folder with plain transformers for ordinary sequences"
    )


AttentionInterface.register(ATTENTION, _attend)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer from hidden states to logits.

    Raises:
        ValueError: it is no nn.Linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{model.config.model_type}: the output layer is {head}, not nn.Linear")
    return head


def trie_hidden_states(model: PreTrainedModel, trie: Trie, layout: TrieLayout) -> Tensor:
    """Final hidden states of every token of the trie, [N, hidden size]."""
    device = model.device
    return _hidden_states(
        model, trie.tokens.to(device), trie.positions.to(device), trie_layout=layout
    )


def paged_hidden_states(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, step: PagedStep
) -> Tensor:
    """Final hidden states of the new tokens of a step, [T, hidden size]; fills their pages.

    ids, positions: int64 [T] on the model's device, in the order of the plan's sequences.
    """
    return _hidden_states(model, ids, positions, paged_step=step)


def _hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, **step) -> Tensor:
    output = model.base_model(
        input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **step
    )
    return output.last_hidden_state.squeeze(0)
