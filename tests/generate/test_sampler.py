"""Draws: their distribution, their truncation, and that they depend on their key alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from threadweaver.generate.sampler import SamplingParams, sample, stream_key
from tw_kernels.sampling import uniforms

VOCABULARY = 50
LARGE = 1000  # several blocks, the last not full


def logits_of(seed: int, rows: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def points(count: int, seed: int = 0) -> np.ndarray:
    keys = np.full(count, stream_key([seed]), np.uint64)
    return uniforms(keys, np.arange(count, dtype=np.uint64))


def kept(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The truncated, renormalised distribution by plain Python, float64, of tempered logits in
    float32: two that differ before the division and not after it are ordered by id."""
    p = (row / torch.tensor(params.temperature)).double().softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: params.top_k]
    total = sum(p[i] for i in order)
    mass, nucleus = 0.0, []
    for i in order:
        if mass >= params.top_p and nucleus:
            break
        nucleus.append(i)
        mass += p[i] / total
    nucleus = [i for i in nucleus if p[i] >= params.min_p * p[order[0]]]
    out = torch.zeros(len(p), dtype=torch.float64)
    for i in nucleus:
        out[i] = p[i]
    return out / out.sum()


def is_drawn_from(
    p: torch.Tensor, point: float, token: torch.Tensor, logprob: torch.Tensor
) -> bool:
    """Whether a point of the cumulative distribution of p falls on this token of that weight."""
    low, high = p[:token].sum(), p[: token + 1].sum()
    on_it = p[token] > 0 and low - 1e-6 <= point <= high + 1e-6
    return bool(on_it) and logprob == pytest.approx(p[token].log().item(), abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 999),
    ties=st.booleans(),
    vocabulary=st.sampled_from([1, VOCABULARY, LARGE]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
@example(seed=756, ties=False, vocabulary=LARGE, temperature=0.3, top_k=1, top_p=1.0, min_p=0.0)
def test_a_draw_inverts_the_cumulative_distribution_of_what_truncation_keeps(
    seed, ties, vocabulary, temperature, top_k, top_p, min_p
):
    params = SamplingParams(temperature, top_k, top_p, min_p)
    logits, u = logits_of(seed, 20, vocabulary), points(20, seed)
    if ties:
        logits = logits.round()
    draws = sample(logits, [params] * 20, u)
    # Rounding decides on a token before which the others hold just about top_p.
    around = [top_p] if top_p == 1 else [top_p * (1 - 1e-6), top_p * (1 + 1e-6)]
    for row, point, token, logprob, sampled in zip(logits, u, *draws, strict=True):
        assert logprob == pytest.approx(row.double().log_softmax(-1)[token].item(), abs=1e-5)
        truncated = (kept(row, replace(params, top_p=x)) for x in around)
        assert any(is_drawn_from(p, point, token, sampled) for p in truncated)


def test_frequencies_follow_the_probabilities():
    count = 40_000
    row = logits_of(1, 1)
    draws = sample(row.expand(count, -1), [SamplingParams(0.8)] * count, points(count))
    found = torch.bincount(draws.tokens, minlength=VOCABULARY) / count
    expected = kept(row[0], SamplingParams(0.8))
    # Five standard deviations of each count.
    assert ((found - expected).abs() <= 5 * (expected / count).sqrt() + 1e-4).all()


def test_temperature_zero_takes_the_likeliest_token_with_certainty():
    logits = logits_of(2, 30)
    draws = sample(logits, [SamplingParams(0.0, top_p=0.5)] * 30, points(30))
    assert torch.equal(draws.tokens, logits.argmax(-1))
    assert torch.equal(draws.sampled_logprobs, torch.zeros(30))
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(draws.logprobs, expected)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, LARGE])
def test_tokens_without_probability_are_never_drawn(vocabulary):
    """Wherever the point falls: at either end, and at the ends of blocks."""
    logits = torch.full((4, vocabulary), -math.inf)
    allowed = [[17], [0, vocabulary - 1], [40, 41], [3, vocabulary // 2, vocabulary - 2]]
    for row, tokens in zip(logits, allowed, strict=True):
        row[tokens] = torch.tensor([0.1 * i for i in range(len(tokens))])
    ends = logits.double().softmax(-1).cumsum(-1).unique().clamp(max=1 - 2.0**-52)
    for end in ends.tolist():
        for u in (end, end - 1e-9, end + 1e-9, end + 1e-7):
            u = np.full(4, min(max(u, 0.0), 1 - 2.0**-52))
            draws = sample(logits, [SamplingParams()] * 4, u)
            assert all(t in tokens for t, tokens in zip(draws.tokens, allowed, strict=True))


def test_a_point_at_the_end_of_a_block_draws_a_token_with_probability():
    """Blocks are found by sums that are rounded otherwise than the weights in them."""
    rows, blocks, size = 40, 79, 256
    logits = logits_of(0, rows, blocks * size) * 4
    logits[:, ::2] = -math.inf  # the first of a block among them
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    ends = weights.view(rows, blocks, size).sum(-1).cumsum(-1, dtype=torch.float64)
    for end in (ends / ends[:, -1:]).T.numpy():
        for u in (end, np.nextafter(end, 0), np.nextafter(end, 2)):
            u = u.clip(0, 1 - 2.0**-52)
            draws = sample(logits, [SamplingParams()] * rows, u)
            assert (draws.logprobs > -math.inf).all()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, LARGE, 200_000])
def test_rows_of_a_large_batch_are_drawn_as_if_alone(vocabulary):
    """On a CPU a batch is taken in parts."""
    logits, u = logits_of(7, 9, vocabulary).bfloat16(), points(9)
    params = [SamplingParams(0.9 if i % 3 else 1.0) for i in range(9)]
    together = sample(logits, params, u)
    for i in range(9):
        alone = sample(logits[[i]], [params[i]], u[[i]])
        assert together.tokens[i] == alone.tokens[0]
        torch.testing.assert_close(together.sampled_logprobs[i], alone.sampled_logprobs[0])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)))
def test_a_draw_does_not_depend_on_what_else_is_in_the_batch(order):
    kinds = [SamplingParams(), SamplingParams(0.0), SamplingParams(0.7, 5), SamplingParams(1, None)]
    params = [kinds[i % 4] for i in range(12)]
    logits, u = logits_of(3, 12), points(12)
    alone = [sample(logits[[i]], [params[i]], u[[i]]) for i in range(12)]
    together = sample(logits[list(order)], [params[i] for i in order], u[list(order)])
    for row, i in enumerate(order):
        assert together.tokens[row] == alone[i].tokens[0]
        torch.testing.assert_close(together.logprobs[row], alone[i].logprobs[0])


def test_streams_differ_in_seed_request_and_position():
    requests = [(seed, *id) for seed in range(20) for id in [(0,), (1,), (0, 0, 0), (0, 1, 0)]]
    keys = [stream_key(request) for request in requests]
    u = np.stack(
        [uniforms(np.full(50, k, np.uint64), np.arange(50, dtype=np.uint64)) for k in keys]
    )
    assert len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 0.02
    between_streams = np.asarray(np.corrcoef(u))[np.triu_indices(len(u), 1)]
    assert abs(between_streams).max() < 0.7


def test_forced_tokens_are_taken_with_their_own_probabilities():
    logits = logits_of(4, 3)
    draws = sample(logits, [SamplingParams(1.0, top_k=1)] * 3, points(3), [7, None, 9])
    assert draws.tokens[0] == 7 and draws.tokens[2] == 9
    assert draws.tokens[1] == logits[1].argmax()
    torch.testing.assert_close(draws.logprobs[0], logits[0].log_softmax(-1)[7])
    assert draws.sampled_logprobs[0] == -math.inf  # truncation would never draw it
    assert draws.sampled_logprobs[1] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_log_probability(bad, temperature):
    logits = logits_of(5, 3)
    logits[1, 4] = bad
    logits[2] = -math.inf
    draws = sample(logits, [SamplingParams(temperature)] * 3, points(3))
    assert draws.logprobs.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        SamplingParams(**{field: value})
