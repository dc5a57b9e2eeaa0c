"""Moments of 8 bits that ranks share: who has them, and how they go from ranks to others."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.train.on_ranks import on_ranks
from threadweaver import ranks
from threadweaver.model.whole import local
from threadweaver.train.memory.optimizer import state_bytes
from threadweaver.train.moments import (
    BLOCK,
    has_codes,
    is_quantised,
    parts,
    shard_sizes,
    without_codes,
)
from threadweaver.train.sharded_checkpoint import (
    load_optimizer,
    save_shards,
    take_whole_optimizer,
)

pytest.importorskip("torchao")
# Rows and columns of matrices, and by how many ranks of 1, 2 and 3 their moments have 8 bits.
SHAPES = {
    (192, 64): (1, 2, 3),
    (320, 64): (1, 2),  # 107 rows of 64 are no whole blocks
    (31, 256): (1,),  # 15 rows are fewer than 4,096 elements, 16 are not
    (100, 24): (),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (2, 3), (7, 5, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shards_have_the_sizes_of_those_of_fsdp(shape, count):
    chunks = [chunk.numel() for chunk in torch.empty(shape).chunk(count)]
    assert shard_sizes(shape, count) == chunks + [0] * (count - len(chunks))


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_have_8_bits_where_all_ranks_have_whole_blocks(shape):
    assert tuple(count for count in (1, 2, 3) if is_quantised(shape, count)) == SHAPES[shape]


class Matrices(nn.Module):
    """Of the shapes above."""

    def __init__(self, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterList([torch.randn(shape) for shape in SHAPES])
        if count > 1:
            fully_shard(self, mesh=init_device_mesh("cpu", (count,)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    from threadweaver.train.adamw_8bit import AdamW8bit

    return AdamW8bit(list(model.parameters()))


def state_of(model: Matrices, optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """What this process has of each parameter's, moments as values."""
    return [{k: without_codes(local(v)) for k, v in optimizer.state[p].items()} for p in model.all]


def move(by: list[int], source: Path, goal: Path | None) -> None:
    """Loads a state into these ranks, checks it against the first, and saves it.

    Args:
        by: numbers of ranks that it has gone by, the last these.
    """
    count = by[-1]
    model = Matrices(count)
    optimizer = optimizer_of(model)
    if source.is_dir():
        load_optimizer(source, model, optimizer)
    else:
        state = torch.load(source, weights_only=True) if ranks.is_first() else None
        take_whole_optimizer(state, model, optimizer)
    first = torch.load(source.parent / "first.pt", weights_only=True)
    ours_of_all = state_of(model, optimizer)
    for shape, parameter, ours, theirs in zip(SHAPES, model.all, ours_of_all, first, strict=True):
        assert ours["step"] == theirs["step"] == 3
        for name in MOMENTS:
            has_8_bits = has_codes(optimizer.state[parameter][name])
            assert has_8_bits == is_quantised(shape, count)
            value = theirs[name].chunk(count)[ranks.rank()]
            if has_8_bits and any(not is_quantised(shape, passed) for passed in by):
                # Codes were found anew: at most half the distance between two of them is lost.
                block = value.view(-1, BLOCK)
                error = (ours[name].view_as(block) - block).abs()
                assert (error <= 0.01 * block.abs().amax(1, keepdim=True)).all(), (shape, name)
            else:
                assert torch.equal(ours[name], value), (shape, name)
    if ranks.is_first():
        found = [local(optimizer.state[p][name]) for p in model.all for name in MOMENTS]
        tensors = [t for m in found for t in (parts(m).values() if has_codes(m) else [m])]
        planned, _ = state_bytes("adamw-8bit", list(SHAPES), torch.float32, count)
        assert sum(t.nbytes for t in tensors) == planned
    if goal is not None:
        save_shards(goal, model, optimizer)


def move_on_ranks(by: list[int], source: Path, goal: Path, rank: int) -> None:
    """What a rank does, in place of a command."""
    torch.compiler.set_stance("force_eager")
    ranks.join()
    move(by, source, goal)
    ranks.leave()
    os._exit(0)


def test_moments_go_from_any_number_of_ranks_to_any(tmp_path, eager):
    """As they are, but where they had no codes."""
    model = Matrices(1)
    optimizer = optimizer_of(model)
    for _ in range(3):
        for parameter in model.all:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "one.pt")
    torch.save(state_of(model, optimizer), tmp_path / "first.pt")
    for by, source, goal in (([1, 2], "one.pt", "two"), ([1, 2, 3], "two", "three")):
        before = partial(move_on_ranks, by, tmp_path / source, tmp_path / goal)
        ended = on_ranks(["sft"], tmp_path, by[-1], before=before)
        assert ended.codes == [0] * by[-1], ended.err
    move([1, 2, 3, 1], tmp_path / "three", None)
