"""A training step at real size, beside unrolled calls: `python -m bench.model_step --help`.

As bench.train_step: supervised fine-tuning on one trajectory, forward and backward, on models of
real shapes with random weights, made on the device (bench/models.py): on CUDA 1.7 B and 8 B
parameters and 16,384 trie tokens, on a CPU a tiny model and fewer. Products are in bfloat16 by
autocast over float32 weights, as in training, where the device multiplies it.

    ours: trie              all calls of the trajectory as one trie, one pass
    unrolled calls          each call a sequence of its own and a pass of its own
    unrolled calls, packed  each call a sequence of its own, up to 10,240 tokens a pass; with our
                            attention

    recompute     the layers whose activations are computed again in the backward pass: all or none
    tok/s         trie tokens over the time, for every peer alike
    TFLOP/s       operations of the model that the trie needs over the time, for every peer alike: 6
                  for each weight but the embedding's and token of the trie, and 14 D Hq for each
                  visible pair and layer. What is computed again does not count
    peak MB       without the weights, of `weight_bytes` in the row; with the gradients
    roofline      that over the rate of a matrix product in the same run: the model's utilisation
    x unrolled, x packed, of ratio, mem / packed
                  as in bench.train_step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import shapes, train_step
from bench.models import check_names, product_weights, random_model
from bench.roofline import Work
from bench.running import suite_main
from bench.step_setup import FineTuning, Pass
from bench.suite import Options, Row, Suite, at_least_one
from bench.train_step import OURS, PACKED, UNROLLED
from threadweaver.device import Precision, memory_of, resolve
from threadweaver.model import WeightCopies, build_tokenizer
from threadweaver.train.setup import recompute_activations

Recompute = Literal["all", "none"]
# Relative, of the gradient: two orders of the same sums in bfloat16. A wrong token, weight or mask
# of one call of ten changes it by a tenth and more.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
STRIDE = 1009  # of the entries of each parameter's gradient that are compared
STATE_BYTES = 8  # a parameter: its weight and its gradient in float32


@dataclass
class ModelStepOptions(Options):
    """Options of bench.model_step, in addition to those of every benchmark.

    Args:
        models: names of shapes: tiny, 1.7B or 8B. Default: those of 1.7B and 8B whose weights and
            gradients fit; on a CPU or with --quick tiny.
        precision: bf16: autocast over float32 weights; auto: bf16 where the device multiplies it,
            else fp32.
        tokens: of the trie. Default: 16,384, on a CPU 1,024, with --quick 160.
        blocks: of the trajectory.
    """

    models: list[str] = field(default_factory=list)
    precision: Precision = "auto"
    tokens: int | None = None
    blocks: int | None = None


class ModelStep(FineTuning):
    """One update of a model of random weights."""

    _sampled: Tensor

    def __init__(
        self, name: str, case: shapes.Case, device: str, precision: str, recompute: Recompute
    ):
        super().__init__(case, device)
        self.name, self.precision, self.recompute = name, precision, recompute
        self.tolerance = TOLERANCE[precision]

    @property
    def key(self) -> Row:
        row = {k: v for k, v in super().key.items() if k != "update"}
        names = {"model": self.name, "dtype": self.precision, "recompute": self.recompute}
        return {"case": row.pop("case"), **names, **row}

    @cached_property
    def model(self) -> PreTrainedModel:
        model = random_model(self.name, build_tokenizer(), str(self.device), torch.float32).train()
        if self.recompute == "all":
            recompute_activations(model)
        return model

    @cached_property
    def copies(self) -> WeightCopies:
        """As a run trains: on a GPU, weights are cast once an update."""
        by_copies = self.device.type == "cuda" and self.precision == "bf16"
        return WeightCopies(self.model, torch.bfloat16 if by_copies else None)

    def run(self, passes: list[Pass]) -> None:
        bf16 = self.precision == "bf16"
        self.model.zero_grad()
        self.copies.cast()
        for step in passes:
            self.model.set_attn_implementation(step.attention)
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = step.loss()
            loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._sampled = torch.cat([g.flatten()[::STRIDE] for g in gradients])
        self.model.zero_grad()  # so that each call's peak of memory holds its gradients
        self.copies.free()

    def gradient(self) -> Tensor:
        """Every STRIDE-th entry of each parameter's gradient: all of them fill a GPU."""
        return self._sampled

    def work(self, peer: str) -> Work:
        """As the base class, and the output layer; the model's rate is that of bfloat16."""
        layers = super().work(peer).flops
        assert layers is not None
        blocks: Any = self.model.base_model.layers
        inner = sum(p.numel() for p in blocks.parameters())
        rest = 6 * (product_weights(self.model) - inner) * self.trie_tokens
        return Work(layers + rest, dtype="bfloat16" if self.precision == "bf16" else "float32")

    @cached_property
    def trie_tokens(self) -> int:
        return self.key["n"]

    def figures(self, peer: str, seconds: float) -> Row:
        return {
            **super().figures(peer, seconds),
            "tokens_per_second": self.trie_tokens / seconds,
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
        }


def setups(options: ModelStepOptions) -> Iterator[ModelStep]:
    at_least_one(options, "tokens", "blocks")
    check_names(options.models)
    small = options.device == "cpu" or options.quick
    tokens, blocks = (160, 2) if options.quick else (1024, 3) if small else (16_384, 4)
    case = shapes.trajectory(options.tokens or tokens, options.blocks or blocks)
    device = torch.device(options.device)
    names = options.models or (["tiny"] if small else _that_fit(device))
    precision = resolve(options.precision, device)
    for name in names:
        for recompute in ("all", "none"):
            yield ModelStep(name, case, options.device, precision, recompute)


def _that_fit(device: torch.device) -> list[str]:
    """The large shapes that fit."""
    return [name for name in ("1.7B", "8B") if memory_needed(name) <= memory_of(device)]


def memory_needed(name: str) -> int:
    """Bytes of a GPU that a shape needs: as many for activations as for weights and gradients."""
    with torch.device("meta"):
        model = random_model(name, build_tokenizer(), "meta", torch.float32)
    return 2 * STATE_BYTES * sum(p.numel() for p in model.parameters())


SUITE: Suite[Any, Any] = replace(
    train_step.SUITE,
    name="model_step",
    options=ModelStepOptions,
    setups=setups,
    peers=[peer for peer in train_step.SUITE.peers if peer.name in (OURS, UNROLLED, PACKED)],
    columns={"tokens_per_second": "tok/s", **train_step.SUITE.columns},
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
