"""sample_tokens: every backend draws the tokens of its definition, bit for bit."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.draws import assert_draws_as_defined, random_logits, rows_of, run
from tw_kernels.sampling import SamplingRows, sample_tokens, uniforms
from tw_kernels.sampling.reference import weights
from tw_kernels.sampling.rows import WHOLE, Settings

NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BACKENDS = ["native", pytest.param("triton", marks=NO_TRITON)]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

PLAIN = Settings.of(1.0, None, 1.0, 0.0)
GREEDY = Settings.of(0.0, None, 0.5, 0.0)
TEMPERED = [PLAIN, GREEDY, *(Settings.of(t, None, 1.0, 0.0) for t in (0.6, 1.7, 1e-5, 1e-30, 1e38))]
TRUNCATED = [
    Settings.of(0.7, 5, 1.0, 0.0),
    Settings.of(1.0, None, 0.9, 0.0),
    Settings.of(1.3, 20, 0.8, 0.01),
    Settings.of(1e-5, None, 0.5, 0.0),
    Settings.of(1.0, 1, 0.3, 1.0),
    Settings.of(1.0, 10**6, 1e-6, 0.0),
    Settings.of(2.0, None, 1 - 2**-53, 0.1),
]


KINDS = ["normal", "ties", "signed zeros", "excluded", "steep"]


@settings(max_examples=80)
@given(
    st.integers(0, 999),
    st.sampled_from([1, 2, 50, 257, 1000]),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_cpu_draws_the_tokens_of_the_definition(seed, vocabulary, kind, dtype):
    every = [*TEMPERED, *TRUNCATED]
    logits = random_logits(seed, len(every), vocabulary, kind).to(dtype)
    assert_draws_as_defined("native", logits, rows_of(every))


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_draws_the_tokens_of_the_definition(isa, kind):
    logits = random_logits(1, 14, 5000, kind)
    assert_draws_as_defined("native", logits, rows_of([*TEMPERED, *TRUNCATED]))


@NO_TRITON
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1, 50, 9000])
def test_triton_draws_the_tokens_of_the_definition(vocabulary, kind):
    dtype = torch.bfloat16 if vocabulary == 50 else torch.float32
    logits = random_logits(2, len(TEMPERED), vocabulary, kind).to(dtype)
    assert_draws_as_defined("triton", logits, rows_of(TEMPERED))


@NO_TRITON
@pytest.mark.parametrize("kind", ["normal", "ties", "excluded"])
def test_triton_truncates_as_defined(kind):
    some = {
        "normal": [*TRUNCATED[:3], GREEDY, PLAIN],
        "ties": [TRUNCATED[2], TRUNCATED[6]],
        "excluded": TRUNCATED[3:6],
    }[kind]
    logits = random_logits(3, len(some), 4200 if kind == "ties" else 50, kind)
    assert_draws_as_defined("triton", logits, rows_of(some))


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [128, 49_152, 151_936])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_draws_the_tokens_of_a_cpu(vocabulary, kind):
    every = [*TEMPERED, *TRUNCATED] * 4
    logits = random_logits(4, len(every), vocabulary, kind).bfloat16()
    rows = rows_of(every)
    want, got = run("native", logits, rows), run("triton", logits, rows)
    assert torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_at_the_end_of_a_token_or_block_draws_the_next(backend):
    """Where the sum of the weights, of a chunk of Triton's too, is exactly the point."""
    logits = torch.zeros(6, 8192)
    logits[:, 1::2] = -math.inf
    ends = torch.tensor([0.0, 1 / 4096, 0.5, 0.5 - 2**-30, 0.75, 1 - 2.0**-52], dtype=torch.float64)
    rows = rows_of([PLAIN] * 6)
    assert_draws_as_defined(backend, logits, rows, ends)
    tokens = run(backend, logits, rows, ends).tokens
    assert tokens.tolist() == [0, 2, 4096, 4094, 6144, 8190]


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_numbers_are_those_of_the_key_and_position(backend):
    """Of 4096 equally likely tokens, the one drawn names the first bits of the number."""
    keys, positions = [0, 1, 2**64 - 1, 0x9E3779B97F4A7C15], [0, 2**40, 5, 10**6]
    rows = SamplingRows.build(keys, positions, [PLAIN] * 4)
    u = uniforms(np.array(keys, np.uint64), np.array(positions, np.uint64))
    tokens = run(backend, torch.zeros(4, 4096), rows).tokens
    assert tokens.tolist() == (u * 4096).astype(int).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_tokens_are_taken_with_their_own_probabilities(backend):
    logits = random_logits(5, 4, 50)
    some = [Settings.of(1.0, 1, 1.0, 0.0), PLAIN, GREEDY, Settings.of(1.0, 1, 1.0, 0.0)]
    rows = rows_of(some, [7, 9, 11, None])
    assert_draws_as_defined(backend, logits, rows)
    draws = run(backend, logits, rows)
    assert draws.tokens.tolist() == [7, 9, 11, int(logits[3].argmax())]
    assert draws.sampled_logprobs.tolist() == [-math.inf, draws.logprobs[1].item(), 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncates", [False, True])
def test_a_row_that_is_no_distribution_has_no_log_probability(backend, truncates):
    logits = random_logits(6, 6, 5000)
    logits[1, 4999], logits[2, 3], logits[3], logits[4, 0] = math.nan, math.inf, -math.inf, math.nan
    some = [Settings.of(1.0, None, 0.9, 0.0) if truncates else PLAIN] * 4  # one of them is drawn
    draws = run(backend, logits, rows_of([*some, GREEDY, GREEDY]))
    assert draws.logprobs.isnan().tolist() == [False, True, True, True, True, False]
    assert ((draws.tokens >= 0) & (draws.tokens < 5000)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone_bit_for_bit(backend, threads):
    few = [PLAIN, TRUNCATED[1], GREEDY] if backend == "native" else [PLAIN, TEMPERED[2], GREEDY]
    logits, rows = random_logits(8, 3, 5000), rows_of(few)
    threads(2)
    together = run(backend, logits, rows)
    threads(1)
    for i in range(3):
        alone = run(backend, logits[[i]], SamplingRows(rows.data[[i]], rows.truncates))
        assert alone.tokens[0] == together.tokens[i]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_larger_tensor_are_read_where_they_are(backend):
    whole = random_logits(9, 8, 700)
    logits = whole[::2, :600]
    some = rows_of([PLAIN, TEMPERED[2], GREEDY, PLAIN])
    assert_draws_as_defined(backend, logits, some)
    assert_draws_as_defined(backend, logits.T.contiguous().T, some)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_rows_give_no_tokens(backend):
    assert run(backend, torch.zeros(0, 10), rows_of([])).tokens.shape == (0,)


def test_weights_are_exponentials_to_a_unit_in_the_last_place_of_float32():
    d = -np.arange(0, 60, 1 / 4096, dtype=np.float32)
    want = np.exp(d.astype(np.float64)) * WHOLE
    assert (abs(weights(d) - want) <= 0.5 + 1.2e-7 * want).all()
    assert weights(np.array([0, -np.inf, np.nan], np.float32)).tolist() == [WHOLE, 0, 0]


@pytest.mark.parametrize(
    ("logits", "rows", "backend", "message"),
    [
        (torch.zeros(10), rows_of([PLAIN]), None, "logits must be"),
        (torch.zeros(1, 0), rows_of([PLAIN]), None, "logits must be"),
        (torch.zeros(2, 10), rows_of([PLAIN]), None, r"rows must be int64 \[2, 7\]"),
        (torch.zeros(1, 10), rows_of([PLAIN]), "cuda", "no backend 'cuda'"),
        (torch.zeros(1, 10, dtype=torch.float64), rows_of([PLAIN]), "triton", "float64"),
        (torch.zeros(1, 10, device="meta"), rows_of([PLAIN]), None, "must share a device"),
    ],
)
def test_what_does_not_fit_is_refused(logits, rows, backend, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(logits, rows, backend=backend)


@pytest.mark.parametrize("points", [torch.zeros(2, dtype=torch.float64), torch.zeros(1)])
def test_points_of_another_dtype_or_number_are_refused(points):
    with pytest.raises(ValueError, match=r"points must be float64 \[1\]"):
        sample_tokens(torch.zeros(1, 10), rows_of([PLAIN]), points)


@pytest.fixture(
    scope="module",
    params=["90", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("80", "86", "89", "100"))],
)
def compiled(request):
    """One row per kernel, compiled for an architecture."""
    pytest.importorskip("triton")
    from tests.kernels.triton_rows import rows_of

    return rows_of("compile_sampling_for_sm90", "bfloat16", "--sm", request.param)


def test_the_compiler_contracts_no_product_and_sum_that_decides_on_a_token(compiled):
    assert {r["kernel"] for r in compiled} == {
        f"{name}_kernel" for name in ("largest", "cut", "weigh", "pick")
    }
    assert [r for r in compiled if r["contractible"]] == []
    # The logarithms of `pick` are fused multiply-adds, in log-probabilities alone.
    assert [r for r in compiled if r["fma"] and r["kernel"] != "pick_kernel"] == []


def test_no_sampling_kernel_spills_registers(compiled):
    assert [r for r in compiled if r["spills"] or r["stack"]] == []
