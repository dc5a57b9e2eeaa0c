"""The model that rollouts run on while it is trained."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threadweaver import ranks
from threadweaver.device import DTYPES
from threadweaver.model import model_without_weights, replace_parameters, to_device
from threadweaver.train.config import ComputeConfig
from threadweaver.train.sharding import gathered


class RolloutModel:
    """In one process the model that is trained. Of one that is divided among ranks, a whole one on
    each, whose weights are there from `gather` to `free`, in the dtype of their products.

    Attributes:
        model: what engines are made of.
    """

    def __init__(
        self, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, compute: ComputeConfig
    ):
        self._trained, self.model, self._is_whole = trained, trained, True
        if ranks.size() == 1:
            return
        self.model = model_without_weights(trained.config, tokenizer, trained.generation_config)
        dtype = DTYPES["bf16" if compute.precision == "bf16" else compute.parameters]
        device = trained.device
        replace_parameters(self.model, lambda p: _no_weights(p.shape, dtype, device))
        to_device(self.model, device)
        self.model.requires_grad_(False).eval()
        self._is_whole = False

    @property
    def bytes_to_gather(self) -> int:
        """What `gather` takes of the device's memory."""
        own = [] if self._is_whole else self.model.parameters()
        return sum(p.numel() * p.dtype.itemsize for p in own)

    @torch.no_grad()
    def gather(self) -> None:
        """Takes the weights as they are now, unless they are there; all ranks call it."""
        if not self._is_whole:
            own = dict(self.model.named_parameters())
            for name, value in gathered(self._trained):
                own[name].data = value.to(own[name].dtype)
            self._is_whole = True

    def free(self) -> None:
        """Gives the memory of the weights back. Engines must be free."""
        if self.model is not self._trained:
            for parameter in self.model.parameters():
                parameter.data = _no_weights(parameter.shape, parameter.dtype, parameter.device)
            self._is_whole = False
            torch.cuda.empty_cache()  # see Runner.free


def _no_weights(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)
