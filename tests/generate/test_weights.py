"""The engine's own weights: cast once for a batch of rollouts, and otherwise the trainer's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rollouts import CODEC, ids
from torch.profiler import ProfilerActivity, profile

from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import EngineSizes
from threadweaver.generate.weights import EngineWeights
from threadweaver.train.memory.blueprint import Architecture
from threadweaver.train.memory.rollout import EngineUse, count_engine
from tw_kernels.linear import MOST_ROWS


def copied(shapes: list[tuple[int, ...]], call: Callable[[], object]) -> list[tuple[int, ...]]:
    """What a call copies of tensors of these shapes, a cast being a copy; one entry for each.

    By the profiler: under inference mode autocast's casts pass by every dispatch mode.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    found = [
        tuple(event.input_shapes[0])
        for event in profiler.events() or []
        if event.name == "aten::copy_" and event.input_shapes[0] == event.input_shapes[1]
    ]
    return sorted(shape for shape in found if shape in shapes)


def matrices(model) -> list[tuple[int, ...]]:
    """Shapes of what autocast casts: all matrices, the output layer among them, which a tied
    embedding is too."""
    found = [
        tuple(module.weight.shape)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return sorted(found)


def run(engine: Engine, max_tokens: int = 60) -> tuple[list, int]:
    settings = GenerationSettings(max_tokens=max_tokens, sampling=SamplingParams(temperature=0))
    for i in range(3):
        engine.add(ids(f"{i}:"), settings)
    steps = []
    return engine.run(steps.append), len(steps)


def test_a_batch_of_rollouts_casts_every_matrix_once(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=200, page_size=8, autocast=True)
    own, steps = matrices(fork_join_model), []

    def batch() -> None:
        steps.append(run(engine, max_tokens=8)[1])

    assert copied(own, batch) == own
    assert copied(own, batch) == own  # a second one casts them anew: they may have been trained
    engine.free()
    assert copied(own, batch) == own
    assert min(steps) > 5


def test_copies_compute_what_autocast_computes(fork_join_model):
    x = torch.randint(0, 100, (1, 9))
    weights = EngineWeights(fork_join_model, torch.bfloat16)
    weights.cast()
    own = weights.model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = torch.randn(1, 9, 64)
        for a, b in zip(fork_join_model.model.layers, own.model.layers, strict=True):
            assert torch.equal(a.mlp(hidden), b.mlp(hidden))
            assert torch.equal(a.self_attn.q_proj(hidden), b.self_attn.q_proj(hidden))
        assert torch.equal(fork_join_model.model.embed_tokens(x), own.model.embed_tokens(x))
        assert torch.equal(fork_join_model.lm_head(hidden), own.lm_head(hidden))


def test_copies_stay_where_they_are_until_they_are_freed(fork_join_model):
    weights = EngineWeights(fork_join_model, torch.bfloat16)
    weights.cast()
    at = [p.data_ptr() for p in weights.model.parameters()]
    weights.cast()
    assert [p.data_ptr() for p in weights.model.parameters()] == at
    weights.free()
    assert all(p.numel() == 0 for p in weights.model.parameters() if p.dtype == torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
def test_each_batch_of_rollouts_has_the_weights_as_they_were_trained(fork_join_model, autocast):
    model = copy.deepcopy(fork_join_model)
    engine = Engine(model, CODEC, num_pages=200, page_size=8, autocast=autocast)
    before, _ = run(engine)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    after, _ = run(engine)
    fresh = Engine(model, CODEC, num_pages=200, page_size=8, autocast=autocast)
    assert [r.response for r in after] == [r.response for r in run(fresh)[0]]
    assert [r.response for r in after] != [r.response for r in before]


def test_the_trainer_keeps_its_mode_and_its_modules(fork_join_model):
    model = copy.deepcopy(fork_join_model).train()
    kinds = [type(module) for module in model.modules()]
    run(Engine(model, CODEC, num_pages=200, page_size=8))
    assert model.training and [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_a_linear_layer_of_any_rows_is_that_of_the_model(fork_join_model, rows):
    own = EngineWeights(fork_join_model, None).model
    x = torch.randn(1, rows, 64)
    with torch.inference_mode():
        got, want = own.lm_head(x), F.linear(x, fork_join_model.lm_head.weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_pages_fill_the_gigabytes_that_they_are_given(fork_join_model, autocast):
    """In the dtype that they are kept in; and the memory plan counts as many."""
    engine = Engine(fork_join_model, CODEC, kv_gigabytes=0.001, page_size=8, autocast=autocast)
    run(engine)
    pages = engine._runner._pages
    assert pages is not None
    page = pages.nbytes // engine.pool.num_pages
    assert 1e6 - page < pages.nbytes <= 1e6
    sizes = EngineSizes(kv_gigabytes=0.001, page_size=8)
    use = EngineUse(sizes, torch.float32, autocast, on_gpu=False)
    architecture = Architecture(fork_join_model.config, None)
    assert count_engine(architecture, use).pages.named(0.001).bytes == pages.nbytes
