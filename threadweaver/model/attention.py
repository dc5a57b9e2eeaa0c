"""The attention of a Hugging Face decoder, replaced by `trie_attention` and `trie_decode`.

The model stays an unmodified `transformers` model: its layers find the function registered here
under the name `ATTENTION` in the library's AttentionInterface. A trie, or the new tokens of a batch
of sequences, go in as one packed row [1, N] with their `position_ids`; the trie's layout or the
step's plan travels beside them as a keyword argument.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor
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

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **variant: Any
    ) -> Tensor:
        """Attention of the new tokens [T, Hq, D] in one layer, whose new keys and values
        [T, Hkv, D] go to their pages; `variant` as in `trie_decode`."""
        start = time.perf_counter()
        cache = self.caches[layer]
        out = trie_decode(q, cache, self.plan, scale, new_k=k, new_v=v, **variant)
        if not out.is_cuda:
            self.attention_seconds += time.perf_counter() - start
        return out


class NoTrie(ValueError):  # noqa: N818 (named for what is missing)
    """Attention was called without a trie's layout and without a step."""


# What a layer passes to its attention, by the interface's names and by those of our ops.
_VARIANT = {"sliding_window": "window", "softcap": "softcap", "s_aux": "sinks"}


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """AttentionInterface: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, D].

    What a layer passes under the names of the interface goes on to our op: `sliding_window`,
    `softcap` and `s_aux` (sinks).
    """
    if reason := _why_not(module, key, value, attention_mask, dropout, kwargs):
        raise ValueError(
            f"{type(module).__name__} {reason}: there is no such attention over a trie"
        )
    # Under autocast, norms and rotary embeddings leave queries and keys in float32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    variant = {
        ours: kwargs[name] for name, ours in _VARIANT.items() if kwargs.get(name) is not None
    }
    if (layout := kwargs.get("trie_layout")) is not None:
        return trie_attention(q, k, v, layout, scaling, **variant).unsqueeze(0), None
    if (step := kwargs.get("paged_step")) is not None:
        return step.attend(module.layer_idx, q, k, v, scaling, **variant).unsqueeze(0), None
    raise NoTrie(
        "this model attends over a trie: call it with trie_layout=trie.layout(device), or load the "
        "folder with plain transformers for ordinary sequences"
    )


def _why_not(module, key, value, attention_mask, dropout, kwargs: dict[str, Any]) -> str | None:
    """What a layer asks of its attention that there is not over a trie, as a clause; or None."""
    if key.shape != value.shape:
        return "has keys and values of different sizes"
    if dropout:
        return "drops out attention weights, unless that dropout is 0 in its config"
    if attention_mask is not None:
        return "makes a mask of its own"
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        return "sees what follows a token"
    if kwargs.get("position_bias") is not None:
        return "adds a bias to its scores"
    return None


AttentionInterface.register(ATTENTION, attend)


def kv_shape(model: PreTrainedModel, num_pages: int, page_size: int) -> tuple[int, ...]:
    """[layers, 2 (keys, values), num_pages, page_size, Hkv, D]."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = 1 if getattr(config, "multi_query", False) else heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, 2, num_pages, page_size, heads, head_dim


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
