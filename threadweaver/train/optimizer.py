"""AdamW: PyTorch's, or torchao's with less state (extra `memory`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from threadweaver.train.config import AdamWConfig, ConfigError, RunConfig


def check_optimizers(config: RunConfig, device: torch.device) -> None:
    """Makes what the settings name ready, so that checkpoints with its state can be read.

    Raises:
        ConfigError: a package is missing, or the device cannot run it; names the setting.
    """
    needed = None
    if config.compute.parameters == "bf16" and config.model.lora is None:
        needed = "compute.parameters is bf16"
    for name, settings in optimizations(config):
        setting = f"{name}.optimizer is {settings.optimizer}"
        if settings.optimizer == "adamw-offload" and device.type != "cuda":
            raise ConfigError(
                f"{setting}: it moves a GPU's state to the host, and the device is {device.type}: "
                "use adamw or adamw-8bit"
            )
        if settings.optimizer != "adamw":
            needed = setting
    if needed is None:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"{needed}: it needs the package 'torchao': pip install 'threadweaver[memory]'"
        )
    importlib.import_module("torchao.optim")


def optimizations(config: Any, prefix: str = "") -> Iterator[tuple[str, AdamWConfig]]:
    """Those of a run's settings, by dotted name."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, AdamWConfig):
            yield f"{prefix}{field.name}", value
        elif is_dataclass(value):
            yield from optimizations(value, f"{prefix}{field.name}.")


def build_optimizer(model: PreTrainedModel, settings: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW of what is trained, without weight decay on vectors (norms, biases). The rate is set
    step by step.

    Moments are in the dtype of the parameters, or in 8 bits; parameters in bfloat16 are rounded at
    random.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    half = parameters[0].dtype == torch.bfloat16
    betas = settings.betas
    if settings.optimizer == "adamw" and not half:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    from torchao.optim import _AdamW  # pyright: ignore[reportMissingImports]

    from threadweaver.train.adamw_8bit import AdamW8bit
    from threadweaver.train.adamw_offload import CPUOffloadOptimizer

    if settings.optimizer == "adamw-8bit":
        return AdamW8bit(groups, betas=betas, bf16_stochastic_round=half)
    if settings.optimizer == "adamw":
        return _AdamW(groups, betas=betas, bf16_stochastic_round=True)
    if half:
        return CPUOffloadOptimizer(groups, _AdamW, betas=betas, bf16_stochastic_round=True)
    return CPUOffloadOptimizer(groups, torch.optim.AdamW, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, so that a new one compiles nothing anew
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradient(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, largest: float
) -> Tensor:
    """Scales the gradient to at most this norm; returns the norm that it had."""
    on_host = getattr(optimizer, "param_d2h_map", None)
    if on_host is not None:
        # An offloaded step takes copies, made beside the backward pass: of the gradient as it is.
        torch.cuda.synchronize()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if on_host is not None:
        factor = (largest / (norm + 1e-6)).clamp(max=1).item()
        for parameter in on_host.values():
            parameter.grad.mul_(factor)
    return norm
