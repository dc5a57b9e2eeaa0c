"""A forward and a backward pass on tensors without memory, and the most that each part of them
holds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from threadweaver.model import (
    cross_entropy_sum,
    output_layer,
    token_logprobs,
    trie_hidden_states,
)
from threadweaver.train.layers import layers_of
from threadweaver.train.memory.blueprint import Blueprint
from threadweaver.train.offload import ActivationOffload
from tw_kernels import Trie, TrieLayout


@dataclass(frozen=True)
class Passes:
    """What decides how much a forward and a backward pass hold.

    Attributes:
        tokens: of the largest trie or pack.
        recomputed: as compute.gradient_checkpointing.
        parameters: their dtype.
        autocast: whether products are in bfloat16.
        on_gpu: whether it is for a GPU.
        policy: whether the loss is that of P-GRPO, which has a gradient a token.
        entropy: whether entropies have a gradient.
        sums_gradients: whether a pass finds the gradients of another, with which its own are
            summed.
        sharded: whether a gradient leaves as soon as it is there, for the ranks that sum it.
        offloaded: whether activations are moved to the host.
        compiled: whether layers run through torch.compile.
    """

    tokens: int
    recomputed: bool | int
    parameters: torch.dtype
    autocast: bool
    on_gpu: bool
    policy: bool = False
    entropy: bool = False
    sums_gradients: bool = False
    sharded: bool = False
    offloaded: bool = False
    compiled: bool = False

    def autocast_context(self) -> torch.autocast:
        """As that of a pass. Compiled layers cast for themselves: nothing is kept for the next."""
        keeps = not self.compiled
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast, cache_enabled=keeps)


class CountedOffload(ActivationOffload):
    """Activations on a host that has memory without end.

    Attributes:
        host_bytes: that they take there: pinned memory comes in powers of two.
    """

    host_bytes = 0

    def to_host(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        self.host_bytes += 2 ** (size - 1).bit_length()
        return tensor.shape, tensor.stride(), tensor.dtype

    def to_device(self, stored: Any) -> Tensor:
        shape, strides, dtype = stored
        return torch.empty_strided(shape, strides, dtype=dtype)


@dataclass(frozen=True)
class PassPeaks:
    """Bytes that a run of the passes found.

    Attributes:
        activations: kept at the end of the forward pass, without the output layer's.
        before_output: held when the output layer begins.
        forward, in_output: the most that is held in the forward pass, and while the output layer
            runs forward and backward.
        last_layer, first_layer, embedding: the most in the backward passes of these.
        backward: the most in all of the backward pass. Of equal layers those at the ends decide;
            grown from layer to layer by as much as from two to three it is at most what it is.
        host: of activations there.
    """

    activations: int
    before_output: int
    forward: int
    in_output: int
    last_layer: int
    first_layer: int
    embedding: int
    backward: int
    host: int

    @property
    def early(self) -> int:
        """The most while all activations are there."""
        return max(self.forward, self.last_layer)

    @property
    def late(self) -> int:
        """The most when all gradients are there."""
        return max(self.first_layer, self.embedding)

    @property
    def in_layers(self) -> int:
        return max(self.early, self.late, self.backward)


def run_passes(
    blueprint: Blueprint,
    passes: Passes,
    trie: Trie,
    layout: TrieLayout,
    offload: CountedOffload | None,
) -> PassPeaks:
    """Runs the layers that the model has, and its output layer."""
    live, model = blueprint.live, blueprint.model
    peaks: list[int] = []  # of the backward pass, layer by layer

    def next_segment(gradient: Tensor) -> None:
        peaks.append(live.peak)
        live.reset_peak()

    def mark(module: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(next_segment)

    marked = [model.get_input_embeddings(), *layers_of(model)]
    hooks = [module.register_forward_hook(mark) for module in marked]
    if offload:
        offload.host_bytes = 0
    if not passes.sums_gradients or passes.sharded:
        model.zero_grad()
    live.reset_peak()
    before = live.now
    moved = offload.forward_pass() if offload else nullcontext()
    with passes.autocast_context(), moved:
        hidden = trie_hidden_states(model, trie, layout)
        activations = live.now - before
        # The output layer apart, as if the rest of the model came after its backward pass.
        final = hidden.detach().requires_grad_()
        forward, before_output = live.peak, live.now
        live.reset_peak()
        loss = _loss(blueprint, final, passes)
    loss.backward()
    del loss
    in_output = live.peak
    live.reset_peak()
    gradient = final.grad
    del final
    for hook in hooks:
        hook.remove()
    hidden.backward(gradient)
    del hidden, gradient
    next_segment(torch.empty(0))
    # Of what comes before the last layer, of it, ..., of the first, and of what comes after it.
    ends = [*peaks[:2], *peaks[-2:]]
    return PassPeaks(
        activations,
        before_output,
        forward,
        in_output,
        max(ends[:2]),
        ends[-2],
        ends[-1],
        max(peaks),
        offload.host_bytes if offload else 0,
    )


def _loss(blueprint: Blueprint, hidden: Tensor, passes: Passes) -> Tensor:
    """A scalar, over all tokens but the first."""
    at = torch.arange(passes.tokens - 1) if passes.tokens > 1 else torch.zeros(1, dtype=torch.int64)
    targets = torch.zeros(len(at), dtype=torch.int64)
    head = output_layer(blueprint.model)
    if not passes.policy:
        return cross_entropy_sum(hidden[at], head, targets)
    found = token_logprobs(hidden[at], head, targets, passes.entropy)
    return (found.logprobs + found.entropies).sum()
