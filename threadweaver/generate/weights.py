"""A model's weights as the engine reads them: the trainer's parameters, and copies cast once.

Under inference mode autocast caches nothing, so every step would cast every matrix again. Here the
matrices that autocast would cast have copies in its dtype, which all steps of a batch of rollouts
read. The copies keep their addresses until `free`, as CUDA graphs require. A matrix that has an
adapter has a copy with the adapter merged into it, whatever its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from threadweaver.model.lora import adapted_layers, merged_weight, unwrap
from tw_kernels.linear import MOST_ROWS, few_row_linear


class EngineWeights:
    """A module like the model's, in evaluation mode.

    Args:
        model: its parameters are shared, so that training moves these weights too.
        dtype: of the copies: what steps are cast to by autocast; None: they compute in the model's
            own dtype, and nothing is copied but what has adapters.

    Attributes:
        model: the module to run; it has no gradient.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None):
        self.model: PreTrainedModel = unwrap(model).eval()
        self._copies: list[tuple[Tensor, Callable[[], Tensor]]] = []  # and what each is a copy of
        self._copy_bytes = 0
        for name, layer in adapted_layers(model).items():
            weight = layer.base_layer.weight
            own_dtype = dtype if dtype and weight.dtype == torch.float32 else weight.dtype
            source = partial(merged_weight, layer)
            self._copy(self.model.get_submodule(name), "weight", own_dtype, source)
        for module in self.model.modules():
            if dtype is not None:
                self._replace(module, dtype)
            elif type(module) is nn.Linear and _fits_few_rows(module):
                module.__class__ = _FewRowLinear

    def _replace(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives a module copies of the parameters of its matrix products. Embeddings and norms have
        none: autocast leaves them in float32."""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding) or all(p.dim() < 2 for p in own.values()):
            return
        for name, parameter in own.items():
            if parameter.dtype == torch.float32:
                self._copy(module, name, dtype, parameter.detach)

    def _copy(
        self, module: nn.Module, name: str, dtype: torch.dtype, source: Callable[[], Tensor]
    ) -> None:
        """Gives a module a parameter of its own, which `cast` makes what the source is."""
        copied = getattr(module, name)
        self._copy_bytes += copied.numel() * dtype.itemsize
        empty = torch.empty(0, dtype=dtype, device=copied.device)
        own = nn.Parameter(empty, requires_grad=False)
        setattr(module, name, own)
        self._copies.append((own, source))

    @torch.no_grad()
    def cast(self) -> None:
        """Updates the copies: once for a batch of rollouts, during which weights do not change."""
        for own, source in self._copies:
            value = source()
            if own.shape == value.shape:
                own.copy_(value)
            else:
                own.data = value.to(own.dtype)

    @property
    def bytes_to_copy(self) -> int:
        """What `cast` takes that is not there yet."""
        return 0 if any(own.numel() for own, _ in self._copies) else self._copy_bytes

    def free(self) -> None:
        """Gives the memory of the copies back."""
        for own, _ in self._copies:
            own.data = own.data.new_empty(0)


def _fits_few_rows(module: nn.Linear) -> bool:
    return module.weight.is_cpu and module.weight.dtype == torch.float32


class _FewRowLinear(nn.Linear):
    """nn.Linear on a CPU that multiplies few rows, as in a decode step, by `few_row_linear`."""

    def forward(self, input: Tensor) -> Any:
        if input.numel() > MOST_ROWS * self.in_features:
            return F.linear(input, self.weight, self.bias)
        return few_row_linear(input, self.weight, self.bias)
