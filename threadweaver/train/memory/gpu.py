"""Lets tensors without memory be computed with as on a GPU, on any machine.

PyTorch makes no CUDA tensors where it was built without CUDA, not even ones without memory. So they
are CPU tensors, and what asks for the device in the passes of an update is answered as on a GPU:
the fused kernels run, on nothing; the output layer works in pieces of a GPU's size; products sum in
float32 without a copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.model import float32_sums, fused, loss, output_pieces, weight_copies

_KERNELS = ("log_softmax", "rms_norm", "rotary", "swiglu")


@contextmanager
def as_on_gpu(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model of CPU tensors without memory holds what it would on a GPU; where Triton is
    not installed, what it would there without Triton. To be entered before FakeTensorMode is."""
    undo: list[tuple[Any, str, Any]] = []
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        pieces = {**loss.LOGITS_AT_ONCE, "cpu": loss.LOGITS_AT_ONCE["cuda"]}
        replace(loss, "LOGITS_AT_ONCE", pieces)
        for module in (float32_sums, weight_copies):
            replace(module, "product", _product)
        replace(output_pieces, "add_product_", _add_product_)
        if importlib.util.find_spec("triton") is not None:
            for name in _KERNELS:
                replace(importlib.import_module(f"tw_kernels.fused.{name}"), "launch", _nothing)
            undo = fused._install(model)
            replace(fused, "_runs_fused", lambda x: True)
            replace(loss, "_by_kernels", lambda hidden: True)
        try:
            yield
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


def _nothing(*arguments: Any, **constants: Any) -> None:
    """In the place of a launch."""


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """In the place of a sum that is taken in place."""
