"""The bytes of one update of the weights, by running it on tensors without memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from threadweaver.model import (
    WeightCopies,
    cross_entropy_sum,
    output_layer,
    token_logprobs,
    trie_hidden_states,
)
from threadweaver.train.memory.blueprint import Architecture, Blueprint, counting
from threadweaver.train.offload import ActivationOffload
from threadweaver.train.setup import recompute_activations
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


@dataclass(frozen=True)
class Unit:
    """Elements of the largest decoder layer, or of all that is in none.

    Attributes:
        parameters: all of them.
        trained: those that have gradients.
        output: of these the output layer's, whose gradient is there first.
    """

    parameters: int
    trained: int
    output: int = 0


@dataclass(frozen=True)
class UpdateBytes:
    """Bytes of one update, the optimizer apart.

    Attributes:
        parameters: and buffers.
        copies: of the weights in the dtype of their products.
        gradients: of all parameters.
        activations: that the forward pass keeps for the backward pass.
        output_pieces: what the output layer holds on top, forward and backward.
        in_output, in_layers: most that is held beside parameters and copies while the output layer
            runs, and while the others do: less than the sum of the above, since the gradients are
            not there while all activations are, or more by what a layer takes while it runs.
        elements: of each parameter that is trained.
        layer, rest: what FSDP2 gathers at a time.
        host: activations that are moved there.
    """

    parameters: int
    copies: int
    gradients: int
    activations: int
    output_pieces: int
    in_output: int
    in_layers: int
    elements: tuple[int, ...]
    layer: Unit
    rest: Unit
    host: int

    @property
    def peak(self) -> int:
        """Most that is held at a time."""
        return self.parameters + self.copies + max(self.in_output, self.in_layers)


def count_update(architecture: Architecture, passes: Passes) -> UpdateBytes:
    """Runs the passes over a trie of which every token is trained on.

    Raises:
        ConfigError: compute.gradient_checkpointing is not possible.
    """
    trie, layout = _line(passes.tokens)
    with counting(architecture, passes.parameters, passes.on_gpu) as blueprint:
        live, model = blueprint.live, blueprint.model
        parameters = live.now
        offload = CountedOffload(model) if passes.offloaded else None
        if passes.recomputed:
            recompute_activations(model, passes.recomputed, offload)
        copies = WeightCopies(model, torch.bfloat16 if passes.on_gpu and passes.autocast else None)
        copies.cast()
        held = live.now
        trained = [p for p in model.parameters() if p.requires_grad]
        if passes.sharded:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        elif passes.sums_gradients:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        live.reset_peak()
        moved = offload.forward_pass() if offload else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=passes.autocast), moved:
            before = live.now
            hidden = trie_hidden_states(model, trie, layout)
            activations = live.now - before
            # The output layer apart, as if the rest of the model came after its backward pass.
            final = hidden.detach().requires_grad_()
            forward, before = live.peak, live.now
            live.reset_peak()
            loss = _loss(blueprint, final, passes)
        loss.backward()
        del loss
        in_output = live.peak
        live.reset_peak()
        gradient = final.grad
        del final
        hidden.backward(gradient)
        del hidden, gradient
        return UpdateBytes(
            parameters,
            held - parameters,
            sum(_size(p) for p in trained),
            activations,
            in_output - before,
            in_output - held,
            max(forward, live.peak) - held,
            tuple(p.numel() for p in trained),
            *_units(model),
            offload.host_bytes if offload else 0,
        )


def count_activations(architecture: Architecture, passes: Passes) -> int:
    """Bytes that the forward pass keeps for the backward pass: those of `count_update`, in less
    time."""
    trie, layout = _line(passes.tokens)
    with counting(architecture, passes.parameters, passes.on_gpu) as blueprint:
        live, model = blueprint.live, blueprint.model
        if passes.recomputed:
            recompute_activations(model, passes.recomputed)
        WeightCopies(model, torch.bfloat16 if passes.on_gpu and passes.autocast else None).cast()
        with torch.autocast("cpu", torch.bfloat16, enabled=passes.autocast):
            before = live.now
            hidden = trie_hidden_states(model, trie, layout)
            activations = live.now - before
            del hidden
    return activations


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


def _line(tokens: int) -> tuple[Trie, TrieLayout]:
    """Tokens that all follow one another: how a trie branches changes no tensor's size."""
    trie = Trie.from_paths([[0] * tokens])
    return trie, trie.layout("cpu")


def _units(model: PreTrainedModel) -> tuple[Unit, Unit]:
    """The largest decoder layer, and all that is in none."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    found = [_unit(list(layer.parameters())) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = _unit([p for p in model.parameters() if id(p) not in inside])
    head = output_layer(model).linear.weight
    output = head.numel() if head.requires_grad else 0
    largest = max(found, key=lambda unit: unit.parameters, default=Unit(0, 0))
    return largest, replace(rest, output=output)


def _unit(parameters: list[nn.Parameter]) -> Unit:
    trained = [p.numel() for p in parameters if p.requires_grad]
    return Unit(sum(p.numel() for p in parameters), sum(trained))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


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
