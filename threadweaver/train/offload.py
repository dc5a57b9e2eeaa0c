"""Activations in the host's memory between the forward and the backward pass
(compute.activation_offload).

PyTorch has hooks for the tensors that a forward pass saves, and a pair of them that moves all
(`torch.autograd.graph.save_on_cpu`). Weights are saved too, and are to stay; and what selective
recomputation keeps goes through no hooks. So both are done here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from threadweaver.train.config import ComputeConfig, ConfigError

# Bytes of the smallest tensor that is moved. A copy of 1 MiB over PCIe takes 40 us at 25 GB/s, the
# launches that it needs about as much; smaller ones are a small part of what a pass keeps.
LEAST_BYTES = 2**20


def check_offload(compute: ComputeConfig, device: torch.device) -> None:
    """Raises ConfigError where there is nothing to move activations from."""
    if compute.activation_offload and device.type != "cuda":
        raise ConfigError(
            "compute.activation_offload: it moves a GPU's activations to the host, and the device "
            f"is {device.type}: leave it out"
        )


@dataclass(frozen=True)
class _OnHost:
    """A tensor that was moved."""

    stored: Any


class ActivationOffload:
    """Moves activations to the host in the forward pass, and back when the backward pass needs
    them. Their bits and strides stay, so gradients do too.

    Copies run on the stream that computes: neither host nor allocator waits for them, and what
    computes next does. Pinned memory is PyTorch's, which rounds each block up to a power of two and
    keeps it for the next pass.

    Args:
        model: its parameters and buffers, copies of weights among them, stay where they are.
        least_bytes: of a tensor that is moved.

    Attributes:
        moved_bytes: to the host since the start of the last forward pass.
    """

    def __init__(self, model: nn.Module, least_bytes: int = LEAST_BYTES):
        self._model = model
        self._least_bytes = least_bytes
        self._weights: set[int] = set()
        self.moved_bytes = 0

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, what the forward pass saves for the backward pass is moved."""
        # By the identity of their storages, anew each time: copies of weights come and go.
        tensors = chain(self._model.parameters(), self._model.buffers())
        self._weights = {id(tensor.untyped_storage()) for tensor in tensors}
        self.moved_bytes = 0
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def keep(self, op: Any) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """Contexts of a layer that is recomputed, for `torch.utils.checkpoint.checkpoint`: the
        results of `op` are moved to the host, and taken from there instead of computed again."""
        results: deque[Any] = deque()
        return _Store(op, results, self), _Load(op, results, self)

    def pack(self, value: Any) -> Any:
        """What stands for a value until the backward pass."""
        if not isinstance(value, Tensor) or not self._is_moved(value):
            return value
        self.moved_bytes += value.numel() * value.element_size()
        return _OnHost(self.to_host(value.detach()))

    def unpack(self, packed: Any) -> Any:
        return self.to_device(packed.stored) if isinstance(packed, _OnHost) else packed

    def to_host(self, tensor: Tensor) -> Any:
        """What stands for a tensor on the host: its copy, and its device."""
        pinned = tensor.device.type == "cuda"
        copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return copy.copy_(tensor, non_blocking=pinned), tensor.device

    def to_device(self, stored: Any) -> Tensor:
        copy, device = stored
        return copy.to(device, non_blocking=True)

    def _is_moved(self, tensor: Tensor) -> bool:
        if not tensor.is_floating_point():  # such as a trie's geometry, which is known by identity
            return False
        if tensor.numel() * tensor.element_size() < self._least_bytes:
            return False
        # A sharded parameter is gathered into another for the time of a layer.
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return False
        return id(tensor.untyped_storage()) not in self._weights


class _Store(TorchDispatchMode):
    """Runs ops, and packs the results of one."""

    def __init__(self, op: Any, results: deque[Any], offload: ActivationOffload):
        super().__init__()
        self._op, self._results, self._offload = op, results, offload

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # a compiled layer calls the op as it is

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self._op:
            self._results.append(tree_map(self._offload.pack, result))
        return result


class _Load(_Store):
    """Runs ops but the one, whose results are unpacked instead."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is self._op:
            return tree_map(self._offload.unpack, self._results.popleft())
        return func(*args, **(kwargs or {}))
