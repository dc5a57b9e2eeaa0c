"""The loss of a trie, and the log-probabilities of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from threadweaver.model.attention import trie_hidden_states
from threadweaver.model.logits import OutputLayer, output_layer
from threadweaver.model.output_pieces import logprobs_and_entropies, negative_log_likelihood
from tw_kernels import Trie, TrieLayout, fused

# Most logits that are held at a time. Every piece reads and writes the gradient of the output
# layer's weights, so few large ones are faster.
# CPU, 128 MiB in float32: of 2^22 to 2^26, within 5 to 10 % of the fastest in float32 and 20 % in
#     bfloat16 with AMX, where 2^24 takes 1.5 times as long (49,152 x 576, 151,936 x 1,024; two Xeon
#     cores, with AVX-512 and held to AVX2).
# CUDA, 512 MiB in bfloat16: at 151,936 x 2,048 a piece of 1,766 tokens; the gradient's 2.5 GB take
#     0.8 ms of an H100's memory beside 4.2 ms for its products, at the rates of copy and product
#     measured there; with 2^24, of 110 tokens, three times as long as its products. The size is not
#     timed yet.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}


def supervised_tokens(trie: Trie) -> Tensor:
    """Flat indices of the tokens that carry loss, int64: positive weight and a parent to predict
    them from."""
    return ((trie.columns["weights"] > 0) & (trie.parents >= 0)).nonzero().squeeze(-1)


def trie_loss(model: PreTrainedModel, trie: Trie, layout: TrieLayout | None = None) -> Tensor:
    """Sum over supervised tokens of -log p(token | its path), each token once; a float32 scalar.

    A token is predicted from the hidden state at its trie parent (docs/architecture.md, fact 5), so
    this equals the loss of all calls run one by one, each shared token counted once.
    """
    device = model.device
    layout = trie.layout(device) if layout is None else layout
    hidden = trie_hidden_states(model, trie, layout)
    at = supervised_tokens(trie)
    return cross_entropy_sum(
        hidden[trie.parents[at].to(device)],
        output_layer(model),
        trie.tokens[at].to(device),
    )


def cross_entropy_sum(hidden: Tensor, head: OutputLayer, targets: Tensor) -> Tensor:
    """Sum of -log softmax(head(hidden))[target]; a float32 scalar.

    hidden [n, hidden size], targets int64 [n]. Large vocabularies go in pieces, so that the
    [n, vocabulary] logits are never held whole.
    """
    rows = rows_at_once(hidden.device.type, len(head.linear.weight))
    if _by_kernels(hidden):
        hidden = hidden.to(_compute_dtype(hidden))
        weight = head.compute_weight(hidden.dtype)
        return negative_log_likelihood(hidden, head, weight, targets, rows)
    if targets.numel() <= rows:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    hidden, weight = _in_compute_dtype(hidden, head.weight)
    if head.bias is None and head.is_linear and hasattr(F, "linear_cross_entropy"):
        from torch.nn import LinearCrossEntropyOptions

        # Left to itself it takes far smaller pieces, 3 to 7 times slower on a CPU.
        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        hidden = hidden if head.scale == 1 else hidden * head.scale
        loss = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
        return loss.float()
    pieces = [
        checkpoint(_cross_entropy_piece, h, weight, head, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(pieces).sum()


def rows_at_once(device: str, vocabulary: int) -> int:
    """Most tokens whose logits are held at a time on a kind of device."""
    return max(1, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"]) // vocabulary)


def _by_kernels(hidden: Tensor) -> bool:
    """Whether the output layer runs piece by piece on kernels of its own (output_pieces.py)."""
    return hidden.is_cuda and fused.why_not(hidden.device) is None


def _cross_entropy_piece(h: Tensor, weight: Tensor, head: OutputLayer, t: Tensor) -> Tensor:
    logits = head.finish(head.products(h, weight))
    return F.cross_entropy(logits.float(), t, reduction="sum")


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Of the output layer's product."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else hidden.dtype


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the output layer's product: cast once, not in every piece."""
    dtype = _compute_dtype(hidden)
    return hidden.to(dtype), weight.to(dtype)


class TokenLogprobs(NamedTuple):
    """Log-probabilities of n tokens under a model, and entropies; both float32 [n].

    Attributes:
        logprobs: log-probability of each token, natural log.
        entropies: of the distribution that predicts each token, in nats.
    """

    logprobs: Tensor
    entropies: Tensor


def trie_logprobs(
    model: PreTrainedModel,
    trie: Trie,
    layout: TrieLayout,
    at: Tensor,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """log p(token | its path) of the tokens at flat indices `at`, int64 [n], none of them a root.

    Entropies carry a gradient only if asked to, which then costs the backward pass as much again
    as the log-probabilities.
    """
    hidden = trie_hidden_states(model, trie, layout)
    return token_logprobs(
        hidden[trie.parents[at].to(hidden.device)],
        output_layer(model),
        trie.tokens[at].to(hidden.device),
        entropy_gradient,
    )


def token_logprobs(
    hidden: Tensor, head: OutputLayer, targets: Tensor, entropy_gradient: bool = False
) -> TokenLogprobs:
    """log softmax(head(hidden))[target], and the entropy of each softmax.

    hidden [n, hidden size], targets int64 [n]. In pieces, as in `cross_entropy_sum`.
    """
    rows = rows_at_once(hidden.device.type, len(head.linear.weight))
    if _by_kernels(hidden):
        hidden = hidden.to(_compute_dtype(hidden))
        weight = head.compute_weight(hidden.dtype)
        found = logprobs_and_entropies(hidden, head, weight, targets, rows, entropy_gradient)
        return TokenLogprobs(*found)
    hidden, weight = _in_compute_dtype(hidden, head.weight)
    if targets.numel() <= rows:
        return _logprobs_piece(hidden, weight, head, targets, entropy_gradient)
    pieces = [
        checkpoint(_logprobs_piece, h, weight, head, t, entropy_gradient, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenLogprobs(*map(torch.cat, zip(*pieces, strict=True)))


def _logprobs_piece(
    h: Tensor, weight: Tensor, head: OutputLayer, t: Tensor, entropy_gradient: bool
) -> TokenLogprobs:
    logprobs = head.finish(head.products(h, weight)).float().log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return TokenLogprobs(logprobs.gather(-1, t.unsqueeze(-1)).squeeze(-1), entropies)
