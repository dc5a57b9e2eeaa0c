"""A step whose loss or gradient is infinite or not a number: kept for inspection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from threadweaver.whole_file import write_whole
from tw_kernels import Trie


class NotFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the message says which and where its batch lies."""


def save_batch(
    folder: Path,
    packs: Sequence[Trie],
    sources: Sequence[Sequence[str]],
    losses: Sequence[float],
    gradient_norm: float,
) -> NotFiniteError:
    """Writes what a step was made of; returns the error to raise.

    tries.pt holds the fields of each micro-batch's trie, by name; batch.json its loss (a share of
    the step's) and where its examples come from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([asdict(trie) for trie in packs], folder / "tries.pt")
    # As text, since JSON has no word for them.
    micro_batches = [
        {"loss": str(loss), "examples": list(examples)}
        for loss, examples in zip(losses, sources, strict=True)
    ]
    batch = {"gradient_norm": str(gradient_norm), "micro_batches": micro_batches}
    write_whole(folder / "batch.json", json.dumps(batch, indent=2) + "\n")
    return NotFiniteError(
        f"{folder.name.removeprefix('nan-')}: loss {sum(losses)}, gradient norm {gradient_norm}; "
        f"its batch and the weights before it are in {folder}; try a lower "
        "optimization.learning_rate or --compute.precision fp32"
    )
