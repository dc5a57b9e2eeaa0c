"""Padded decode steps in captured graphs give what plain steps give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TRAJECTORIES
from hypothesis import given
from hypothesis import strategies as st
from rollouts import CODEC, ids
from torch import Tensor

from threadweaver.generate import Engine, GenerationSettings, Rollout
from threadweaver.generate.graphs import Capture, cuda_capture, padded
from threadweaver.generate.runner import Runner
from threadweaver.generate.sampler import SamplingParams
from tw_kernels import PlanSizes


class EagerCapture:
    """A capture that a CPU can do: the call runs again, into the same output."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        output = call().fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        return replay, output


def decode(model, capture: Capture | None) -> list[Rollout]:
    engine = Engine(model, CODEC, num_pages=500, page_size=8)
    engine._runner = Runner(model, 500, 8, capture=capture)
    for prompt in TRAJECTORIES:
        settings = GenerationSettings(max_tokens=400, max_depth=2, sampling=SamplingParams(0))
        engine.add(ids(prompt), settings)
    rollouts = engine.run()
    engine.free()
    return rollouts


def test_padded_steps_decode_what_plain_steps_decode(fork_join_model):
    capture = EagerCapture()
    expected, got = decode(fork_join_model, None), decode(fork_join_model, capture)
    assert [r.response for r in got] == [r.response for r in expected]
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    # Few graphs serve many steps.
    assert 1 <= capture.captured <= 30 and capture.replayed > 3 * capture.captured


@given(st.tuples(*[st.integers(0, 10**6)] * 4))
def test_a_capacity_holds_its_plan_and_is_less_than_twice_as_large(sizes):
    capacity = padded(PlanSizes(*sizes))
    for size, room in zip(sizes, capacity, strict=True):
        assert size <= room < 2 * max(size, 1) and room & (room - 1) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_decode_what_plain_steps_decode(fork_join_model, dtype):
    import copy

    model = copy.deepcopy(fork_join_model).to("cuda", dtype)
    expected, got = decode(model, None), decode(model, cuda_capture)
    assert [r.response for r in got] == [r.response for r in expected]
