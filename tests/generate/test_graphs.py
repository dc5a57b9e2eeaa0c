"""Padded steps in captured graphs, planned ahead, give what plain steps give; what they cost."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import TRAJECTORIES
from hypothesis import given
from hypothesis import strategies as st
from rollouts import CODEC, ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.model.families import large_weights, small_config
from threadweaver.generate import Engine, GenerationSettings, Rollout
from threadweaver.generate.graphs import LEAST_ITEMS, Capture, CudaCapture, StepGraphs, power_of_two
from threadweaver.generate.runner import Runner
from threadweaver.generate.sampler import SamplingParams
from threadweaver.model import ATTENTION
from tw_kernels import DecodePlan, PlanSizes
from tw_kernels.cuda_graphs import WaitsForDevice


class EagerCapture:
    """A capture that a CPU can do: the call runs again, into the same output."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        output = call().fill_(-1)

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        return replay, output


WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}


class NoWaits(TorchDispatchMode):
    """Refuses what would wait for a GPU: numbers and shapes that follow from values. In inference
    mode it sees calls before they are made of others."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in WAITS or (name == "where" and len(args) == 1)
        if name == "index":
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if name == "repeat_interleave":
            waits = any(isinstance(x, Tensor) for x in args[1:])
        if waits:
            raise WaitsForDevice(str(func))
        return func(*args, **(kwargs or {}))


class UnwaitingCapture(EagerCapture):
    """One that refuses what CudaCapture refuses."""

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        call()
        with NoWaits():
            call()
        return super().__call__(call)


GREEDY = SamplingParams(temperature=0)
# The model is so sure of what it knows that it takes some heat to make it stray.
UNSURE = SamplingParams(temperature=2, min_p=0.01)


def engine_with(model, capture: Capture | None, autocast: bool = False) -> Engine:
    engine = Engine(model, CODEC, num_pages=500, page_size=8)
    engine._runner = Runner(model, 500, 8, capture=capture, autocast=autocast)
    return engine


def decode(
    engine: Engine, sampling: SamplingParams = GREEDY, prompts=TRAJECTORIES
) -> list[Rollout]:
    for seed, prompt in enumerate(prompts):
        settings = GenerationSettings(max_tokens=400, max_depth=2, sampling=sampling)
        engine.add(ids(prompt), settings, seed)
    return engine.run()


@pytest.mark.parametrize("sampling", [GREEDY, UNSURE], ids=["greedy", "sampled"])
def test_padded_steps_planned_ahead_decode_what_plain_steps_decode(fork_join_model, sampling):
    capture = EagerCapture()
    plain, padded = engine_with(fork_join_model, None), engine_with(fork_join_model, capture)
    expected, got = decode(plain, sampling), decode(padded, sampling)
    assert [r.response for r in got] == [r.response for r in expected]
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    # Few graphs serve many steps, of prefill too.
    assert 1 <= capture.captured <= 30 and capture.replayed > 3 * capture.captured
    assert capture.replayed == padded.counts.steps
    # Nothing that was planned ahead and dropped is left behind.
    assert padded.pool.free_pages == 500
    assert [page for page in padded.pool._holders if page] == []


def events_of(engine: Engine) -> list[str]:
    """Names of the runner's calls, as they come; what is planned is launched, and once."""
    events: list[str] = []

    def spy(name: str) -> None:
        call = getattr(engine._runner, name)

        def spied(*args, **kwargs):
            events.append(name)
            return call(*args, **kwargs)

        setattr(engine._runner, name, spied)

    for name in ("plan", "launch", "read"):
        spy(name)
    return events


def test_most_steps_of_a_long_run_start_before_their_predecessors_are_read(fork_join_model):
    engine = engine_with(fork_join_model, EagerCapture())
    events = events_of(engine)
    decode(engine, prompts=["0:"])
    pattern = ["plan", "launch", "read"]
    assert events[:2] == pattern[:2] and events[-1] == "read"
    # The device has a step to go on with while the host reads one and thinks of the next.
    waiting = [
        events[: i + 1].count("launch") - events[:i].count("read") for i in range(len(events))
    ]
    ahead = [n == 2 for n, event in zip(waiting, events, strict=True) if event == "read"]
    assert len(ahead) == engine.counts.steps > 40 and sum(ahead) > 0.9 * len(ahead)
    assert events.count("plan") == events.count("launch") == events.count("read")


@pytest.mark.parametrize("prompts", [["0:"], ["2:"], TRAJECTORIES], ids=["0", "2", "all"])
def test_steps_launched_ahead_of_a_stop_token_leave_nothing_behind(fork_join_model, prompts):
    plain, ahead = engine_with(fork_join_model, None), engine_with(fork_join_model, EagerCapture())
    events = events_of(ahead)
    for engine in (plain, ahead):
        reported = []
        for seed, prompt in enumerate(prompts):
            settings = GenerationSettings(max_tokens=400, max_depth=2, sampling=GREEDY)
            engine.add(ids(prompt), settings, seed)
        rollouts = engine.run(reported.extend)
        # Tokens drawn after a stop token are neither reported nor counted.
        assert len(reported) == engine.decoded_tokens
        assert len(reported) == sum(rollout.num_sampled_tokens for rollout in rollouts)
    assert ahead.decoded_tokens == plain.decoded_tokens
    # Each stop of the last running sequence costs a step, and one late sequence a later start.
    assert plain.counts.steps < ahead.counts.steps < 1.1 * plain.counts.steps
    assert events.count("read") == ahead.counts.steps
    assert ahead._ahead is None and ahead.pool.free_pages == 500
    ahead.free()


def test_a_generation_counts_the_steps_that_it_would_without_steps_launched_ahead(fork_join_model):
    counts = []
    for capture in (None, EagerCapture()):
        engine = engine_with(fork_join_model, capture)
        settings = GenerationSettings(max_tokens=400, max_depth=2, sampling=GREEDY)
        generation = engine.add(ids("2:"), settings)
        engine.run()
        counts.append(generation.steps)
    assert counts[0] == counts[1] > 40


def test_a_long_run_of_mixed_requests_captures_no_graph_after_warm_up(fork_join_model):
    capture = EagerCapture()
    engine = engine_with(fork_join_model, capture)

    def serve() -> None:
        for prompts in (TRAJECTORIES, ["4:", "1:"], ["2:"], [*TRAJECTORIES, "1:", "1:"]):
            for sampling in (GREEDY, UNSURE):
                decode(engine, sampling, prompts)

    serve()
    warm, steps = engine.counts.captures, engine.counts.steps
    assert 0 < warm == capture.captured <= 20
    serve()
    assert engine.counts.steps == 2 * steps > 400
    assert engine.counts.captures == warm
    engine.free()
    decode(engine, prompts=["2:"])  # the graphs went with the pages
    assert engine.counts.captures > warm


def test_a_step_takes_one_copy_to_the_device_and_one_back_and_a_batch_one_cast(fork_join_model):
    for capture in (None, EagerCapture()):
        engine = engine_with(fork_join_model, capture, autocast=True)
        page_copies = []
        copy_pages = engine._runner._copy

        def spy(copies, copy_pages=copy_pages, page_copies=page_copies):
            page_copies.append(bool(copies))
            copy_pages(copies)

        engine._runner._copy = spy
        decode(engine)
        decode(engine, prompts=["1:"])
        counts = engine.counts
        assert counts.steps == len(page_copies) > 100
        assert counts.copies_to_host == counts.steps
        assert counts.copies_to_device == counts.steps + sum(page_copies)
        assert counts.casts == 2


def test_a_capture_that_refuses_waits_takes_the_steps_of_an_ordinary_model(fork_join_model):
    capture = UnwaitingCapture()
    engine = engine_with(fork_join_model, capture)
    assert [r.response for r in decode(engine, prompts=["1:"])] == [
        r.response for r in decode(engine_with(fork_join_model, None), prompts=["1:"])
    ]
    assert capture.replayed == engine.counts.steps > 20


def test_steps_whose_attention_waits_for_the_device_are_in_no_graph(
    fork_join_model, monkeypatch, capsys
):
    """On a GPU attention of a head dim or a page size that Triton lacks runs on `reference`, which
    would also keep what it read of the first plan for all later ones."""
    expected = decode(engine_with(fork_join_model, None), prompts=["1:"])
    monkeypatch.setenv("TW_DECODE_BACKEND", "reference")
    capture = UnwaitingCapture()
    engine = engine_with(fork_join_model, capture)
    assert not engine._runner.overlaps
    got = decode(engine, prompts=["1:"])
    assert [r.response for r in got] == [r.response for r in expected]
    assert capture.captured == engine.counts.captures == 0
    assert capsys.readouterr().err == ""


def dbrx() -> PreTrainedModel:
    """Its experts are those that some token of the step chose: a loop on the host."""
    config = small_config("dbrx", vocab_size=128)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    large_weights(model)
    return model.eval()


def test_a_model_that_waits_for_the_device_runs_without_graphs_and_a_line_says_so(capsys):
    model = dbrx()
    expected = decode(engine_with(model, None), UNSURE, ["0:", "1:"])
    capture = UnwaitingCapture()
    engine = engine_with(model, capture)
    for _ in range(2):
        got = decode(engine, UNSURE, ["0:", "1:"])
        assert [r.response for r in got] == [r.response for r in expected]
        engine.free()
    assert capture.captured == engine.counts.captures == 0
    said = "warning: dbrx: its layers wait for the device: steps run without CUDA graphs\n"
    assert capsys.readouterr().err == said


def test_a_model_that_waits_in_some_steps_alone_goes_on_without_graphs(fork_join_model):
    """A graph may be running, and its draws be the ids of the step that cannot be captured."""
    model = copy.deepcopy(fork_join_model)
    expected = decode(engine_with(model, None))

    def few(module, args, output):
        if output.shape[1] <= 4:
            output.sum().item()

    model.model.layers[1].mlp.register_forward_hook(few)
    capture = UnwaitingCapture()
    engine = engine_with(model, capture)
    events = events_of(engine)
    assert [r.response for r in decode(engine)] == [r.response for r in expected]
    assert 0 < capture.replayed < engine.counts.steps and not engine._runner.overlaps
    # The step that no graph holds was launched while the one before it, in a graph, ran.
    unread = [events[:i].count("launch") - events[:i].count("read") for i in range(len(events))]
    last_ahead = len(events) - unread[::-1].index(2)
    assert events[:last_ahead].count("launch") == capture.replayed + 1
    assert engine.pool.free_pages == 500


@given(st.lists(st.tuples(st.integers(1, 256), st.integers(1, 999), st.integers(0, 9999))))
def test_capacities_hold_their_plans_and_are_few(needs):
    graphs = StepGraphs(lambda inputs: inputs.ids, EagerCapture(), 1000, 64, torch.device("cpu"))
    seen = set()
    for rows, items, slots in needs:
        capacity = graphs._capacity(PlanSizes(rows, 7, items, slots))
        assert capacity.pages == 1000
        assert rows <= capacity.rows < 2 * rows
        assert items <= capacity.items < max(2 * items, 2 * LEAST_ITEMS)
        assert slots <= capacity.slots
        seen.add(capacity)
        again = graphs._capacity(PlanSizes(rows, 9, items, slots // 2))
        assert again == capacity  # fewer partial results take no other graph
    # For each pair of the first two, the partial results double each time.
    pairs = {(c.rows, c.items) for c in seen}
    assert len(seen) <= len(pairs) * 14


def test_a_graph_is_kept_until_the_capture_of_the_one_in_its_place_is_done():
    """A step of it may be running; and a pool whose graphs are all gone takes no others."""
    made: list[weakref.ref] = []
    kept: list[bool] = []

    def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        kept.extend(replay() is not None for replay in made)
        replay, output = EagerCapture()(call)
        made.append(weakref.ref(replay))
        return replay, output

    graphs = StepGraphs(lambda inputs: inputs.ids.int(), capture, 10, 4, torch.device("cpu"))
    for slots in (16, 32):
        capacity = PlanSizes(1, 10, LEAST_ITEMS, slots)
        pages = [np.arange(2, dtype=np.int32)]
        graphs.stage(DecodePlan.build(pages, [9], [1], 8, capacity=capacity), False)
    assert kept == [True]
    assert [replay() is not None for replay in made] == [False, True]


def test_graphs_share_a_pool_until_all_are_gone_and_streams_for_good(monkeypatch):
    """cuBLAS leaves memory in the pool of the first capture, and PyTorch then takes no more into
    it; and it keeps memory for each stream."""

    class Graph:
        def replay(self) -> None: ...

    streams, pools = [MagicMock(), MagicMock()], iter("ab")
    cuda = MagicMock(graph_pool_handle=pools.__next__, CUDAGraph=Graph)
    cuda.Stream.side_effect = streams
    monkeypatch.setattr(torch, "cuda", cuda)
    capture = CudaCapture()
    graphs = [capture(lambda: torch.zeros(1)) for _ in range(3)]
    del graphs[:2]
    graphs.append(capture(lambda: torch.zeros(1)))
    assert cuda.graph.call_args.kwargs == {"pool": "a", "stream": streams[1]}
    graphs.clear()
    cuda.reset_mock()  # it holds what it was called with
    capture(lambda: torch.zeros(1))
    assert cuda.graph.call_args.kwargs == {"pool": "b", "stream": streams[1]}


def test_what_waits_for_the_device_is_found_before_the_capture(monkeypatch):
    modes, cuda = ["default"], MagicMock()
    cuda.get_sync_debug_mode = lambda: modes[-1]
    cuda.set_sync_debug_mode = modes.append
    monkeypatch.setattr(torch, "cuda", cuda)

    def waits() -> Tensor:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    with pytest.raises(WaitsForDevice):
        CudaCapture()(waits)
    assert modes == ["default", "error", "default"] and not cuda.graph.called
    # What ran before is not overtaken by what comes next.
    assert call(cuda.Stream()) in cuda.current_stream().wait_stream.mock_calls

    def fails() -> Tensor:
        if modes[-1] == "error":
            raise RuntimeError("out of memory")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        CudaCapture()(fails)
    assert not isinstance(raised.value, WaitsForDevice) and modes[-1] == "default"


def test_power_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_decode_what_plain_steps_decode(fork_join_model, dtype):
    model = copy.deepcopy(fork_join_model).to("cuda", dtype)
    expected = decode(engine_with(model, None))
    engine = engine_with(model, CudaCapture())
    for _ in range(2):
        got = decode(engine)
        assert [r.response for r in got] == [r.response for r in expected]
        engine.free()  # a trainer does, after each batch


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [4, 8])
def test_models_and_pages_that_no_graph_can_hold_decode_on_cuda(fork_join_model, page_size, capsys):
    model = copy.deepcopy(fork_join_model) if page_size == 4 else dbrx()
    torch.nn.Module.to(model, "cuda")
    plain, engine = (Engine(model, CODEC, num_pages=500, page_size=page_size) for _ in range(2))
    plain._runner = Runner(model, 500, page_size, capture=None)
    expected = decode(plain, prompts=["0:", "1:"])
    for _ in range(2):
        got = decode(engine, prompts=["0:", "1:"])
        assert [r.response for r in got] == [r.response for r in expected]
        engine.free()
    assert engine.counts.captures == 0
    assert capsys.readouterr().err.count("without CUDA graphs") == (page_size == 8)
