"""The bytes of one update of the weights, by running it on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from threadweaver.model import (
    WeightCopies,
    output_layer,
    trie_hidden_states,
)
from threadweaver.train.layers import layers_of
from threadweaver.train.memory.blueprint import Architecture, counting
from threadweaver.train.memory.first_layers import of_all_layers
from threadweaver.train.memory.passes import CountedOffload, Passes, run_passes
from threadweaver.train.setup import recompute_activations
from tw_kernels import Trie, TrieLayout


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
        late: of in_layers, when all gradients are there.
        shapes: of each parameter that is trained.
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
    late: int
    shapes: tuple[tuple[int, ...], ...]
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
        _copies(model, passes).cast()
        held = live.now
        trained = [p for p in model.parameters() if p.requires_grad]
        if passes.sharded:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        elif passes.sums_gradients:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        # Some layers recomputed and some not are not alike.
        is_uniform = not passes.recomputed or passes.recomputed is True
        found = of_all_layers(
            model, is_uniform, lambda: run_passes(blueprint, passes, trie, layout, offload)
        )
        return UpdateBytes(
            parameters,
            held - parameters,
            sum(_size(p) for p in trained),
            found.activations,
            found.in_output - found.before_output,
            found.in_output - held,
            found.in_layers - held,
            found.late - held,
            tuple(tuple(p.shape) for p in trained),
            *_units(model),
            found.host,
        )


@dataclass(frozen=True)
class _Forward:
    """Bytes that a forward pass keeps."""

    activations: int


def count_activations(architecture: Architecture, passes: Passes) -> int:
    """Bytes that the forward pass keeps for the backward pass: those of `count_update`, in less
    time."""
    trie, layout = _line(passes.tokens)
    with counting(architecture, passes.parameters, passes.on_gpu) as blueprint:
        live, model = blueprint.live, blueprint.model
        if passes.recomputed:
            recompute_activations(model, passes.recomputed)
        _copies(model, passes).cast()

        def run() -> _Forward:
            with passes.autocast_context():
                before = live.now
                hidden = trie_hidden_states(model, trie, layout)
                found = _Forward(live.now - before)
                del hidden
            return found

        return of_all_layers(model, True, run).activations


def _copies(model: PreTrainedModel, passes: Passes) -> WeightCopies:
    dtype = torch.bfloat16 if passes.on_gpu and passes.autocast else None
    return WeightCopies(model, dtype, layers_of(model) if passes.compiled else [])


def _line(tokens: int) -> tuple[Trie, TrieLayout]:
    """Tokens that all follow one another: how a trie branches changes no tensor's size."""
    trie = Trie.from_paths([[0] * tokens])
    return trie, trie.layout("cpu")


def _units(model: PreTrainedModel) -> tuple[Unit, Unit]:
    """The largest decoder layer, and all that is in none."""
    layers = layers_of(model)
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


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.dtype.itemsize
