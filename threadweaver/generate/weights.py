"""A model's weights as the engine reads them: the trainer's parameters, and copies cast once.

Under inference mode autocast caches nothing, so every step would cast every matrix again. Here the
matrices that autocast would cast have copies in its dtype, which all steps of a batch of rollouts
read. The copies keep their addresses until `free`, as CUDA graphs require.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tw_kernels.linear import MOST_ROWS, few_row_linear


class EngineWeights:
    """A module like the model's, in evaluation mode.

    Args:
        model: its parameters are shared, so that training moves these weights too.
        dtype: of the copies: what steps are cast to by autocast; None: they compute in the model's
            own dtype, and nothing is copied.

    Attributes:
        model: the module to run; it has no gradient.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None):
        shared = [*model.parameters(), *model.buffers(), model.config]
        self.model: PreTrainedModel = copy.deepcopy(model, {id(x): x for x in shared}).eval()
        self._copies: list[tuple[Tensor, Tensor]] = []  # and what each is a copy of
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
                empty = torch.empty(0, dtype=dtype, device=parameter.device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
                self._copies.append((getattr(module, name), parameter))

    @torch.no_grad()
    def cast(self) -> None:
        """Updates the copies: once for a batch of rollouts, during which weights do not change."""
        for own, parameter in self._copies:
            if own.shape == parameter.shape:
                own.copy_(parameter)
            else:
                own.data = parameter.to(own.dtype)

    @property
    def bytes_to_copy(self) -> int:
        """What `cast` takes that is not there yet."""
        missing = [(own, p) for own, p in self._copies if own.shape != p.shape]
        return sum(p.numel() * own.dtype.itemsize for own, p in missing)

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
