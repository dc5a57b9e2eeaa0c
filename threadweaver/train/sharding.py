"""A model whose parameters, gradients and moments are divided among the ranks (FSDP2).

Each decoder layer is gathered when it is run and dropped after; the embedding, the last norm and
the output layer from the start of a pass to its end. The losses read the output layer's weight, so
a pass is the forward of a module whose result is the loss, `Passes`.

Gradients are sums over ranks: a loss is divided by what the whole step has, on whichever ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threadweaver import ranks
from threadweaver.device import DTYPES
from threadweaver.model import replace_parameters, save_model, to_device
from threadweaver.model.lora import adapted_layers, merged_weight
from threadweaver.model.trained_rows import rows_of
from threadweaver.model.whole import whole
from threadweaver.train.config import ComputeConfig
from threadweaver.train.layers import layers_of

P = ParamSpec("P")
T = TypeVar("T")


class Passes(nn.Module):
    """Runs functions of a model, with all parameters there that they read besides its layers'.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        function: Callable[Concatenate[PreTrainedModel, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """function(model, ...); all ranks run as many, with and without gradients alike.

        Args:
            args, kwargs: no tensors, nor tuples, lists or dicts of them: on GPUs FSDP moves such to
                the rank's GPU and casts those of floating point. What an object holds it leaves.
        """
        return function(self.model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        if isinstance(self, FSDPModule) and not torch.is_grad_enabled():
            self.reshard()  # which else the backward pass does
        return result


def shard(
    full: PreTrainedModel | None,
    like: PreTrainedModel,
    compute: ComputeConfig,
    device: torch.device,
) -> Passes:
    """Divides a model among the ranks, which all call it.

    Args:
        full: the model, on rank 0; None: its weights stay as they come, to be loaded.
        like: the same without weights (`model_without_weights`); it becomes the sharded one.
        compute: precision bf16: parameters are gathered, and the model computes, in bfloat16, and
            gradients are summed over the ranks in float32.
        device: of this rank.
    """
    dtype = DTYPES[compute.parameters]
    # The fused kernels look at a model where it computes: parameters there that take no memory.
    replace_parameters(like, lambda p: torch.zeros((), dtype=dtype, device=device).expand(p.shape))
    to_device(like, device)
    replace_parameters(like, lambda p: p.to("meta"))
    mesh = init_device_mesh(device.type, (ranks.size(),))
    half = DTYPES[compute.precision] == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    for layer in layers_of(like):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    passes = Passes(like)
    fully_shard(passes, mesh=mesh, mp_policy=policy)
    for module in passes.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    passes._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    if ranks.from_first(full is not None):
        _fill(like, full)
    return passes


@torch.no_grad()
def _fill(model: PreTrainedModel, full: PreTrainedModel | None) -> None:
    """Gives each rank its part of the weights of rank 0."""
    source: Mapping[str, Tensor] = {} if full is None else full.state_dict()
    for name, parameter in model.named_parameters():
        scatter(parameter, source.get(name))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {n: b.cpu() for n, b in source.items() if n not in parameters}
    model.load_state_dict(ranks.from_first(stored), strict=False)


def scatter(into: Tensor, full: Tensor | None) -> None:
    """Copies a tensor of rank 0 to one that is divided among the ranks, which all call it."""
    assert isinstance(into, DTensor)
    device = into.to_local().device
    if full is None:
        full = torch.empty(into.shape, dtype=into.dtype, device=device)
    full = full.detach().to(device, into.dtype).contiguous()
    into.copy_(distribute_tensor(full, into.device_mesh, into.placements))


@torch.no_grad()
def gathered(model: PreTrainedModel, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of each parameter of a sharded model, tied ones once, on every rank. All
    run through it.

    Args:
        merged: with its adapters, if it has some, in the weights; else without them.
    """
    adapted = adapted_layers(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):  # of an adapter
            continue
        value = whole(parameter)
        owner, _, leaf = name.rpartition(".")
        if merged and leaf == "weight":
            if (layer := adapted.get(owner.removesuffix(_BASE))) is not None:
                value = merged_weight(layer, value).to(value.dtype)
            elif (own := rows_of(model.get_submodule(owner))) is not None:
                value = value.index_copy(0, own.ids, own.rows.to(value.dtype))
        yield _plain(name), value


_BASE = ".base_layer"  # what peft calls a layer that has an adapter


def _plain(name: str) -> str:
    """The name of a parameter in a model without adapters."""
    return name.replace(f"{_BASE}.", ".")


def weights_on_first(model: PreTrainedModel, merged: bool = True) -> dict[str, Tensor]:
    """The state dict of a sharded model as it would be in one process, on the CPU of rank 0; on the
    others empty. All call it; `merged` as above."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, DTensor):
            names.setdefault(id(parameter), []).append(_plain(name))
    tied = {found[0]: found for found in names.values()}
    weights: dict[str, Tensor] = {}
    for name, value in gathered(model, merged):
        if ranks.is_first():
            weights |= dict.fromkeys(tied[name], value.cpu())
    if not ranks.is_first():
        return {}
    stored = model.state_dict().keys()
    buffers = {n: buffer.cpu() for n, buffer in model.named_buffers() if n in stored}
    return weights | buffers


def sum_gradients(model: nn.Module) -> None:
    """Adds up, over the ranks, the gradients of what each of them has whole; all call it. Those of
    what is sharded are sums already."""
    own = [p.grad for p in model.parameters() if p.grad is not None]
    own = [gradient for gradient in own if not isinstance(gradient, DTensor)]
    if ranks.size() == 1 or not own:
        return
    flat = torch.cat([gradient.flatten() for gradient in own])
    dist.all_reduce(flat)
    for gradient, total in zip(own, flat.split([g.numel() for g in own]), strict=True):
        gradient.copy_(total.view_as(gradient))


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merged: bool = True,
) -> None:
    """Writes a plain Hugging Face folder, by rank 0; all ranks call it.

    Args:
        merged: of a sharded model with adapters: with them, or without.
    """
    weights = weights_on_first(model, merged) if ranks.size() > 1 else None
    if ranks.is_first():
        save_model(model, tokenizer, folder, weights)
