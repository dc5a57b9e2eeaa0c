"""From final hidden states to logits: the output layer, and what a model does to its result.

The one place that knows it, for the loss, the engine and the sampler alike. A family that does
anything else is refused by the probe (probe.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from threadweaver.model.trained_rows import TrainedRows, rows_of

# Products are taken with a multiple of this many output rows where the table has them: tensor cores
# are fast on logits whose rows begin at multiples of 16 bytes. Not timed yet.
_ROWS_MULTIPLE = {"cuda": 64}


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """logits = softcap * tanh(scale * linear(hidden) / softcap), over the ids that have a token.

    Attributes:
        linear: hidden size -> output rows.
        scale: multiplies the logits (Granite, Cohere).
        softcap: bounds them; None: no bound (Gemma).
        rows: logits are of the ids below it; None: of all output rows.
        unknown: bool [rows], true for ids without a token: they get the lowest finite logit, so
            probability 0. None: there are none below `rows`.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    unknown: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """[at least rows, hidden size]: what products are taken with, before `finish`."""
        weight = self.linear.weight
        return weight if self.rows is None else weight[: self._width]

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        """`weight` in the dtype of a product, without a gradient: the copy that all passes of a
        step share (weight_copies.py), if there is one."""
        copy = getattr(self.linear, "cast_weight", None)
        if copy is None or copy.dtype != dtype:
            return self.weight.detach().to(dtype)
        return copy if self.rows is None else copy[: self._width]

    @property
    def bias(self) -> Tensor | None:
        """Of the rows of `weight`, or None."""
        bias = self.linear.bias
        return bias if bias is None or self.rows is None else bias[: self._width]

    @property
    def _width(self) -> int | None:
        if self.rows is None:
            return None
        multiple = _ROWS_MULTIPLE.get(self.linear.weight.device.type, 1)
        return -(-self.rows // multiple) * multiple  # a slice ends with the table

    @property
    def is_linear(self) -> bool:
        """Whether logits are scale times the product with `weight`."""
        plain = self.softcap is None and self.unknown is None and self.trained is None
        return plain and self._width == self.rows

    @property
    def trained(self) -> TrainedRows | None:
        """Rows that stand in for some of `weight`."""
        return rows_of(self.linear)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of hidden states [..., hidden size]."""
        return self.finish(self._with_trained(self.linear(hidden), hidden))

    def products(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., at least rows], before `finish`.

        Args:
            weight: `weight`, in the dtype of the products.
        """
        return self._with_trained(F.linear(hidden, weight, self.bias), hidden)

    def _with_trained(self, products: Tensor, hidden: Tensor) -> Tensor:
        found = self.trained
        return products if found is None else found.replace_products_(products, hidden)

    def finish(self, logits: Tensor) -> Tensor:
        """The model's logits [..., rows] from products [..., at least rows]; float32 if they
        change, else as they are."""
        if self.rows is not None:
            logits = logits[..., : self.rows]
        if self.scale == 1 and self.softcap is None and self.unknown is None:
            return logits
        logits = logits.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.unknown is not None:
            # Finite, since p log p of an entropy must be 0 for them.
            logits = logits.masked_fill(self.unknown, torch.finfo(logits.dtype).min)
        return logits


def output_layer(model: PreTrainedModel) -> OutputLayer:
    """The layer from hidden states to logits.

    Raises:
        ValueError: it is no nn.Linear.
    """
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1) / _divisor(config)
    return OutputLayer(
        _linear(model),
        float(scale),
        getattr(config, "final_logit_softcapping", None),
        getattr(model, "known_rows", None),
        getattr(model, "unknown_ids", None),
    )


def _linear(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{model.config.model_type}: the output layer is {head}, not nn.Linear")
    return head


def _divisor(config: PretrainedConfig) -> float:
    """By what a model divides its logits; HyperCLOVA X multiplies by the field of this name."""
    scaling = getattr(config, "logits_scaling", None) or 1
    return 1 / scaling if config.model_type == "hyperclovax" else scaling


def mask_unknown_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """From now on, ids that the tokenizer has no token for have probability 0, in sampling and in
    training alike: an output table often has more rows than there are tokens.

    A model's own matter, not saved with it; to be called again whenever one of the two grows.
    """
    rows = _linear(model).weight.shape[0]
    ids = [id for id in tokenizer.get_vocab().values() if 0 <= id < rows]
    known = torch.zeros(rows, dtype=torch.bool)
    known[ids] = True
    end = max(ids, default=-1) + 1
    unknown = ~known[:end]
    vars(model)["known_rows"] = end if end < rows else None
    device = "cpu" if model.device.type == "meta" else model.device
    model.register_buffer(
        "unknown_ids", unknown.to(device) if unknown.any() else None, persistent=False
    )
