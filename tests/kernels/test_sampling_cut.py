"""sample_tokens in Triton where top_k or top_p cut a row: what is kept is that of the definition,
to the token, though few logits are looked at."""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.draws import assert_draws_as_defined, random_logits, rows_of, run
from tw_kernels.sampling import SamplingRows, triton
from tw_kernels.sampling.rows import Settings

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

QWEN3 = Settings.of(0.6, 20, 0.95, 0.0)
NUCLEUS = Settings.of(1.0, None, 0.9, 0.0)
PLAIN, GREEDY = Settings.of(1.0, None, 1.0, 0.0), Settings.of(0.0, 5, 0.5, 0.0)
MIN_P = Settings.of(1.0, None, 1.0, 0.1)


def assert_cut_as_defined(logits: Tensor, settings: Settings, point: float = 0.5) -> None:
    """Of a row of logits, taken three times: a draw, and two forced tokens, the last kept one and
    the one after it, which have a probability and none."""
    likely = torch.sort(logits.float(), descending=True, stable=True).indices.tolist()
    every = logits.expand(len(likely), -1)
    kept = run("reference", every, rows_of([settings] * len(likely), likely)).sampled_logprobs
    last = int(kept.isfinite().sum()) - 1
    rows = rows_of([settings] * 3, [None, likely[last], likely[min(last + 1, len(likely) - 1)]])
    points = torch.full((3,), point, dtype=torch.float64)
    assert_draws_as_defined("triton", logits.repeat(3, 1), rows, points)


def rows_that_are_hard_to_cut() -> dict[str, Tensor]:
    normal = random_logits(0, 1, 300)[0]
    huge, lonely, few = normal.clone(), torch.full((300,), -math.inf), torch.full((300,), -math.inf)
    huge[123], lonely[77] = 1e30, -5.0
    few[[3, 70, 71, 250]] = torch.tensor([1.0, 2.0, 1.0, -40.0])
    return {
        "all equal": torch.full((300,), 0.5),
        "one huge": huge,
        "all -inf but one": lonely,
        "fewer than k that are not -inf": few,
        "subnormal": (normal * 1e-39).abs(),
        "flat": normal * 1e-3,
        "both zeros": torch.tensor([0.0, -0.0, -1.0]).repeat(100),
        "ascending": torch.linspace(-4, 4, 300),
        "weights of 0": -torch.arange(300.0) * 7,
    }


def hard_cases() -> list:
    """Each kind of row by each setting, listed or not; one of the four where tests must be few."""
    cases = []
    for i, kind in enumerate(rows_that_are_hard_to_cut()):
        for j, (settings, listed) in enumerate(itertools.product([QWEN3, NUCLEUS], [16384, 1])):
            marks = [] if i % 4 == j else [pytest.mark.slow]
            name = "qwen3" if settings == QWEN3 else "nucleus"
            name = f"{kind}, {name}, {'listed' if listed > 1 else 'too many to list'}"
            cases.append(pytest.param(kind, settings, listed, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("kind", "settings", "candidates"), hard_cases())
def test_rows_that_are_hard_to_cut_are_cut_as_defined(kind, settings, candidates, monkeypatch):
    monkeypatch.setattr(triton, "CANDIDATES", candidates)
    assert_cut_as_defined(rows_that_are_hard_to_cut()[kind], settings)


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999),
        "vocabulary": st.sampled_from([1, 2, 63, 64, 65, 200]),
        "kind": st.sampled_from(["normal", "ties", "excluded", "steep"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "temperature": st.sampled_from([1.0, 0.6, 1e-5, 1e38]),
        "k": st.sampled_from([None, 1, 2, 20, 64, 199, 200]),
        "p": st.sampled_from([1e-300, 0.1, 0.5, 0.95, 1 - 2**-53, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "point": st.sampled_from([0.0, 0.5, 1 - 2.0**-52]),
    }
)


def assert_case_is_cut_as_defined(seed, vocabulary, kind, dtype, temperature, k, p, min_p, point):
    logits = random_logits(seed, 1, vocabulary, kind)[0].to(dtype)
    assert_cut_as_defined(logits, Settings.of(temperature, k, p, min_p), point)


@hypothesis(max_examples=5)
@given(CASES)
def test_any_settings_cut_as_defined(case):
    assert_case_is_cut_as_defined(**case)


@pytest.mark.slow
@hypothesis(max_examples=60)
@given(CASES)
def test_any_settings_cut_as_defined_at_length(case):
    assert_case_is_cut_as_defined(**case)


def test_groups_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(triton, "MOST_GROUPS", 32)  # of 256 tokens
    logits, rows = random_logits(1, 2, 5000, "ties"), rows_of([QWEN3, NUCLEUS])
    assert_draws_as_defined("triton", logits, rows)


def launches(monkeypatch, logits: Tensor, rows: SamplingRows) -> dict[str, tuple]:
    """Kernel -> grid and arguments, in order."""
    seen = {}
    launch = triton.launch

    def record(kernel, grid, *arguments, **constants):
        seen[kernel.__name__] = (grid, arguments)
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(triton, "launch", record)
    run("triton", logits, rows)
    return seen


def test_where_no_row_truncates_nothing_is_launched_or_written_for_it(monkeypatch):
    seen = launches(monkeypatch, random_logits(2, 2, 5000), rows_of([PLAIN, GREEDY]))
    assert {name: grid for name, (grid, _) in seen.items()} == {
        "largest_kernel": (2, 2), "weigh_kernel": (2, 2), "pick_kernel": (2,),
    }  # fmt: skip
    assert [sum(a is None for a in arguments) for _, arguments in seen.values()] == [1, 1, 2]


def test_cutting_adds_one_launch_and_looks_at_few_tokens(monkeypatch):
    """Of a row whose likeliest 20 tokens are kept: a few of 20,000; of rows that neither top_k nor
    top_p cuts: none."""
    some = [QWEN3, NUCLEUS, MIN_P, PLAIN, GREEDY]
    logits = random_logits(3, len(some), 20_000).bfloat16()
    seen = launches(monkeypatch, logits, rows_of(some))
    assert [*seen] == ["largest_kernel", "weigh_kernel", "cut_kernel", "pick_kernel"]
    (grid, arguments) = seen["cut_kernel"]
    assert grid == (len(some),)
    values = arguments[7]
    assert values.shape == (len(some), triton.CANDIDATES)
    listed = (~values.isnan()).sum(1).tolist()
    assert 20 <= listed[0] <= 80
    kept = torch.softmax(logits[1].float(), 0).sort(descending=True).values.cumsum(0) < 0.9
    assert int(kept.sum()) < listed[1] <= 8 * int(kept.sum())
    assert listed[2:] == [0, 0, 0]


def test_what_workspaces_held_before_changes_nothing(monkeypatch):
    some = [QWEN3, NUCLEUS, MIN_P, QWEN3]
    logits = random_logits(4, len(some), 4200, "ties")
    logits[3, 7] = math.nan
    rows = rows_of(some)
    empty, results = torch.empty, []
    for number in (-1, 0x5A5A5A5A):

        def filled(*args, make=empty, number=number, **options):
            new = make(*args, **options)
            return new.fill_(number * 1e20 if new.is_floating_point() else number)

        monkeypatch.setattr(torch, "empty", filled)
        monkeypatch.setattr(
            torch, "empty_like", lambda x, dtype=None: torch.empty(x.shape, dtype=dtype or x.dtype)
        )
        results.append(run("triton", logits, rows))
    for one, other in itertools.pairwise(results):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.sampled_logprobs[:3], other.sampled_logprobs[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_cuts_as_a_cpu(scale, dtype):
    """From flat, where candidates are too many to be listed, to steep."""
    some = [QWEN3, NUCLEUS, Settings.of(1.0, 3000, 0.99, 0.0), Settings.of(1.0, None, 0.5, 0.001)]
    logits = (random_logits(5, 16, 151_936) * scale).to(dtype)
    rows = rows_of(some * 4)
    assert torch.equal(run("triton", logits, rows).tokens, run("native", logits, rows).tokens)
