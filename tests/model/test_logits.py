"""Output layers: scale, soft cap and ids without a token, in losses, in the engine and as drawn."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.architecture import SMALL
from tests.model.families import VOCABULARY, large_weights
from threadweaver.generate import Engine, GenerationSettings
from threadweaver.model import (
    OutputLayer,
    add_tags,
    build_tokenizer,
    cross_entropy_sum,
    mask_unknown_ids,
    new_model,
    output_layer,
    token_logprobs,
    trie_logprobs,
)
from threadweaver.model import logits as model_logits
from threadweaver.model import loss as model_loss
from threadweaver.trajectory import Codec
from tw_kernels import Trie, fused

ARCH = {**SMALL, "tie_word_embeddings": False}
VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "scale and softcap": {"scale": 3.0, "softcap": 2.0},
    "rows": {"rows": 71},
    "holes": {"rows": 71, "unknown": torch.arange(71) % 7 == 3},
    "all": {"scale": 0.3, "softcap": 2.0, "rows": 71, "unknown": torch.arange(71) % 7 == 3},
}


def reference(linear, hidden, targets, scale=1.0, softcap=None, rows=None, unknown=None):
    """In float64: log-probabilities, entropies."""
    logits = scale * F.linear(hidden, linear[0], linear[1] if len(linear) > 1 else None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    known = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    if rows is not None:
        known[rows:] = False
    if unknown is not None:
        known[: len(unknown)] &= ~unknown
    ids = known.nonzero()[:, 0]
    logprobs = logits[:, ids].log_softmax(-1)
    at = torch.searchsorted(ids, targets)
    return logprobs.gather(-1, at[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("at_once", [2**24, 500], ids=["whole", "pieces"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("multiple", [1, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_those_in_float64(variant, multiple, bias, at_once, monkeypatch):
    monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setitem(model_logits._ROWS_MULTIPLE, "cpu", multiple)
    check_losses(variant, bias, num_tokens=40)


@pytest.fixture
def by_kernels(monkeypatch):
    """The output layer runs as on a GPU, in Triton's interpreter, in pieces of 5 tokens."""
    pytest.importorskip("triton")
    if reason := fused.why_not(torch.device("cpu")):
        pytest.skip(reason)
    monkeypatch.setattr(model_loss, "_by_kernels", lambda hidden: True)
    monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cpu", 5 * 90)


@pytest.mark.parametrize(
    "variant, multiple, bias", [("plain", 1, False), ("rows", 64, True), ("all", 64, False)]
)
def test_losses_and_gradients_of_the_kernels_equal_those_in_float64(
    variant, multiple, bias, by_kernels, monkeypatch
):
    monkeypatch.setitem(model_logits._ROWS_MULTIPLE, "cpu", multiple)
    check_losses(variant, bias, num_tokens=8)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_on_a_gpu_equal_those_in_float64(variant, monkeypatch):
    monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cuda", 500)
    with torch.device("cuda"):
        check_losses(variant, bias=True, num_tokens=40)


@pytest.mark.gpu
def test_the_weights_gradient_on_a_gpu_is_summed_in_float32(monkeypatch):
    """Of 4,096 pieces, whose sum in bfloat16 would stand still."""
    monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cuda", 96)
    with torch.device("cuda"):
        head = OutputLayer(torch.nn.Linear(24, 96, bias=False))
        hidden = torch.randn(1, 24).expand(4096, 24)
        targets = torch.zeros(4096, dtype=torch.int64)
        want = F.cross_entropy(head(hidden), targets, reduction="sum")
        with torch.autocast("cuda", torch.bfloat16):
            got = cross_entropy_sum(hidden, head, targets)
    (wanted,), (mine,) = (torch.autograd.grad(x, [head.linear.weight]) for x in (want, got))
    assert (mine - wanted).norm() <= 2e-2 * wanted.norm()


def check_losses(variant, bias, num_tokens):
    torch.manual_seed(0)
    variant = dict(VARIANTS[variant])
    if "unknown" in variant:
        variant["unknown"] = variant["unknown"].to(torch.get_default_device())
    hidden = torch.randn(num_tokens, 24, requires_grad=True)
    linear = torch.nn.Linear(24, 90, bias=bias)
    head = OutputLayer(linear, **variant)
    targets = torch.randint(0, 10, (num_tokens,)) * 7
    weights = torch.rand(num_tokens), torch.rand(num_tokens)
    inputs = [hidden, *linear.parameters()]
    doubles = [x.detach().double().requires_grad_() for x in inputs]

    logprobs, entropies = reference(doubles[1:], doubles[0], targets, **variant)
    got = cross_entropy_sum(hidden, head, targets)
    torch.testing.assert_close(got.double(), -logprobs.sum(), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(got, inputs)
    want = torch.autograd.grad(-logprobs.sum(), doubles, retain_graph=True)
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)

    both = token_logprobs(hidden, head, targets, entropy_gradient=True)
    torch.testing.assert_close(both.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.entropies.double(), entropies, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(weights[0] @ both.logprobs + weights[1] @ both.entropies, inputs)
    want = torch.autograd.grad(
        weights[0].double() @ logprobs + weights[1].double() @ entropies, doubles
    )
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Records what is computed: the largest result, and how often each operation ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.counts = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.counts[function.overloadpacket.__name__] += 1
        return result


@pytest.mark.parametrize("update", ["sft", "rl"])
def test_the_kernels_hold_one_piece_of_logits_and_one_gradient_of_the_weight(update, by_kernels):
    head = OutputLayer(torch.nn.Linear(24, 90, bias=False))
    hidden, targets = torch.randn(20, 24, requires_grad=True), torch.zeros(20, dtype=torch.int64)
    with Sizes() as sizes:
        if update == "sft":
            loss = cross_entropy_sum(hidden, head, targets)
        else:
            loss = token_logprobs(hidden, head, targets).logprobs.sum()
        loss.backward()
    assert sizes.largest == 24 * 90  # the weight's gradient; a piece of logits has 5 x 90
    assert sizes.counts["zeros_like"] == 1
    # Of each of 4 pieces: its products, in RL twice, and a product for each gradient.
    assert sizes.counts["mm"] == {"sft": 4 + 4, "rl": 2 * 4 + 4}[update]
    assert sizes.counts["addmm_"] == 4


def test_a_loss_by_kernels_without_a_gradient_computes_none(by_kernels):
    head = OutputLayer(torch.nn.Linear(24, 90, bias=False))
    with torch.no_grad(), Sizes() as sizes:
        cross_entropy_sum(torch.randn(8, 24), head, torch.zeros(8, dtype=torch.int64))
    assert sizes.counts["mm"] == 2 and not sizes.counts["addmm_"]


def test_kernels_under_autocast_sum_the_gradient_of_a_float32_weight_in_float32(by_kernels):
    torch.manual_seed(1)
    head = OutputLayer(torch.nn.Linear(24, 90, bias=False))
    hidden, targets = torch.randn(12, 24, requires_grad=True), torch.randint(0, 90, (12,))
    want = cross_entropy_sum(hidden, head, targets)
    inputs = (hidden, head.linear.weight)
    wanted = torch.autograd.grad(want, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = cross_entropy_sum(hidden, head, targets)
    grads = torch.autograd.grad(got, inputs)
    assert got.dtype == grads[1].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


def test_pieces_of_a_gpu_and_of_a_cpu():
    vocabulary = 151_936
    assert model_loss.rows_at_once("cuda", vocabulary) == 1766
    assert model_loss.rows_at_once("cpu", vocabulary) == 220
    assert model_loss.rows_at_once("cpu", 2**30) == 1


def padded_model(tokenizer):
    """Its output table has 64 rows more than there are tokens, and those are the likeliest."""
    model = new_model(tokenizer, ARCH)
    known = len(output_layer(model).weight)
    model.resize_token_embeddings(known + 64, mean_resizing=False)
    large_weights(model)
    with torch.no_grad():
        model.lm_head.weight[known:] *= 3
    mask_unknown_ids(model, tokenizer)
    return model, known


def test_ids_without_a_token_are_never_drawn_and_ratios_agree():
    tokenizer = build_tokenizer()
    model, known = padded_model(tokenizer)
    # A hole: an id below the largest that no token has.
    holes = torch.zeros(known, dtype=torch.bool)
    holes[200:230] = True
    model.register_buffer("unknown_ids", holes, persistent=False)
    engine = Engine(model, Codec.from_tokenizer(tokenizer), num_pages=200)
    prompt = engine.codec.encode("47*86=?\n")
    for seed in range(8):
        engine.add(prompt, GenerationSettings("sequential", 40), seed=seed)
    tokens = set()
    for rollout in engine.run():
        (completion,) = rollout.completions
        tokens |= set(completion.tokens)
        path = completion.context + completion.tokens
        trie = Trie.from_paths([path])
        at = torch.arange(len(completion.context), len(path))
        logprobs = trie_logprobs(model, trie, trie.layout(), at).logprobs
        torch.testing.assert_close(
            logprobs, torch.tensor(completion.logprobs), rtol=1e-4, atol=1e-4
        )
    assert len(tokens) > 20
    assert max(tokens) < known and not tokens & set(range(200, 230))


def test_every_id_of_the_tokenizer_stays_and_no_other(monkeypatch):
    tokenizer = build_tokenizer()
    model, known = padded_model(tokenizer)
    head = output_layer(model)
    assert head.rows == known == len(tokenizer) and head.unknown is None
    assert head(torch.zeros(3, 32)).shape == (3, known)
    assert not any("unknown" in name for name in model.state_dict())
    holed = build_tokenizer()
    vocabulary = holed.get_vocab()
    ids = sorted(vocabulary.pop(token) for token in "56")
    monkeypatch.setattr(holed, "get_vocab", lambda: vocabulary)
    mask_unknown_ids(model, holed)
    unknown = output_layer(model).unknown
    assert unknown is not None and unknown.nonzero()[:, 0].tolist() == ids


def test_a_mask_costs_nothing_where_every_row_has_a_token():
    head = output_layer(new_model(build_tokenizer(), ARCH))
    assert head.rows is None and head.unknown is None
    assert head.weight is head.linear.weight
    logits = torch.randn(2, 5)
    assert head.finish(logits) is logits


def test_added_tags_are_known_at_once():
    from tests.trajectory.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = new_model(tokenizer, ARCH)
    assert output_layer(model).rows == len(tokenizer)
    add_tags(tokenizer, model)
    head = output_layer(model)
    assert head.rows == len(tokenizer) < len(head.linear.weight)


def test_an_entropy_of_masked_logits_is_finite():
    head = OutputLayer(torch.nn.Linear(4, VOCABULARY), unknown=torch.arange(VOCABULARY) > 2)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    got = token_logprobs(torch.randn(2, 4), head, torch.tensor([0, 2]))
    torch.testing.assert_close(got.entropies, torch.full((2,), math.log(3)))
    torch.testing.assert_close(got.logprobs, torch.full((2,), -math.log(3)))
