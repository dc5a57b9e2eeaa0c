"""The bytes of one update of the weights, by running it on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from threadweaver.model import (
    WeightCopies,
    cross_entropy_sum,
    output_layer,
    token_logprobs,
    trie_hidden_states,
)
from threadweaver.train.memory.blueprint import Architecture, Blueprint, counting
from threadweaver.train.setup import recompute_activations
from tw_kernels import Trie


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
    """

    tokens: int
    recomputed: bool | int
    parameters: torch.dtype
    autocast: bool
    on_gpu: bool
    policy: bool = False
    entropy: bool = False
    sums_gradients: bool = False


@dataclass(frozen=True)
class UpdateBytes:
    """Bytes of one update, the optimizer apart.

    Attributes:
        parameters: and buffers.
        copies: of the weights in the dtype of their products.
        gradients: of all parameters.
        activations: that the forward pass keeps for the backward pass.
        output_pieces: what the output layer holds on top, forward and backward.
        peak: most that is held at a time: less than the sum of all these, since the gradients are
            not there while all activations are, or more by what a layer takes while it runs.
        elements: of each parameter that is trained.
    """

    parameters: int
    copies: int
    gradients: int
    activations: int
    output_pieces: int
    peak: int
    elements: tuple[int, ...]


def count_update(architecture: Architecture, passes: Passes) -> UpdateBytes:
    """Runs the passes over a trie of which every token is trained on.

    Raises:
        ConfigError: compute.gradient_checkpointing is not possible.
    """
    # Tokens that all follow one another: how a trie branches changes no tensor's size.
    trie = Trie.from_paths([[0] * passes.tokens])
    layout = trie.layout("cpu")
    recomputed = passes.recomputed
    with counting(architecture, passes.parameters, passes.on_gpu) as blueprint:
        live, model = blueprint.live, blueprint.model
        parameters = live.now
        if recomputed:
            recompute_activations(model, recomputed)
        copies = WeightCopies(model, torch.bfloat16 if passes.on_gpu and passes.autocast else None)
        copies.cast()
        held = live.now
        trained = [p for p in model.parameters() if p.requires_grad]
        if passes.sums_gradients:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        live.reset_peak()
        with torch.autocast("cpu", torch.bfloat16, enabled=passes.autocast):
            before = live.now
            hidden = trie_hidden_states(model, trie, layout)
            activations = live.now - before
            # The output layer apart, as if the rest of the model came after its backward pass.
            final = hidden.detach().requires_grad_()
            in_layers, before = live.peak, live.now
            live.reset_peak()
            loss = _loss(blueprint, final, passes)
        loss.backward()
        del loss
        output_pieces = live.peak - before
        gradient = final.grad
        del final
        hidden.backward(gradient)
        del hidden, gradient
        return UpdateBytes(
            parameters,
            held - parameters,
            sum(_size(p) for p in trained),
            activations,
            output_pieces,
            max(in_layers, live.peak),
            tuple(p.numel() for p in trained),
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


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.dtype.itemsize
