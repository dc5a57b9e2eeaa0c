"""Hugging Face models over tries: the same loss and gradients as their calls one by one."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import _dynamo as dynamo
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.peak_memory import peak_tensor_bytes
from threadweaver.model import (
    OutputLayer,
    build_tokenizer,
    check_supported,
    cross_entropy_sum,
    load_model,
    new_model,
    save_model,
    supervised_tokens,
    trie_loss,
)
from threadweaver.model import loss as model_loss
from threadweaver.tasks.multiplication import question, trajectory
from threadweaver.train.config import ConfigError
from threadweaver.train.setup import compile_layers, recompute_activations
from threadweaver.trajectory import Codec, extract_calls, loss_trie
from tw_kernels import Trie
from tw_kernels.attention import native

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHS = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, **TINY},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **TINY},
}
TOKENIZER = build_tokenizer()
CODEC = Codec.from_tokenizer(TOKENIZER)


def encode(factors, parallel=True) -> tuple[list[int], int]:
    """Ids of a worked multiplication and the length of its prompt."""
    prompt = CODEC.encode(question(factors))
    answer = CODEC.encode(trajectory(factors, parallel=parallel))
    return [*prompt, *answer, CODEC.eos_id], len(prompt)


def make_trie(trajectories, loss):
    tries = []
    for ids, prompt_length in trajectories:
        tries.append(loss_trie(ids, CODEC, prompt_length, loss).trie)
    return Trie.pack(tries)


def loss_of_unrolled_calls(model, trajectories, loss):
    """Every call run as its own sequence by plain SDPA; tokens that calls share count once."""
    model.set_attn_implementation("sdpa")
    total = torch.zeros(())
    for ids, prompt_length in trajectories:
        counted = set()
        for call in extract_calls(ids, CODEC, prompt_length):
            path = call.path
            first = len(call.context)
            if loss == "response" and call.kind == "sequential":
                first = prompt_length
            logprobs = model(input_ids=torch.tensor([path])).logits[0].log_softmax(-1)
            for i in range(first, len(path)):
                if tuple(path[: i + 1]) not in counted:
                    counted.add(tuple(path[: i + 1]))
                    total = total - logprobs[i - 1, path[i]]
    model.set_attn_implementation("trie")
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", ["completions", "response"])
@pytest.mark.parametrize("arch", ARCHS)
def test_trie_loss_and_gradients_equal_those_of_the_unrolled_calls(arch, loss):
    model = new_model(TOKENIZER, ARCHS[arch], seed=1)
    trajectories = [encode((47, 86)), encode((3, 508, 21)), encode((9, 12), parallel=False)]
    got = trie_loss(model, make_trie(trajectories, loss))
    want = loss_of_unrolled_calls(model, trajectories, loss)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    got, want = gradients(model, got), gradients(model, want)
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() <= 1e-5 * want[name].norm(), name


def test_response_loss_covers_the_joined_path_and_completions_do_not():
    ids, prompt_length = encode((47, 86))
    supervised = {
        loss: supervised_tokens(make_trie([(ids, prompt_length)], loss)).numel()
        for loss in ("completions", "response")
    }
    calls = extract_calls(ids, CODEC, prompt_length)
    threads = [call for call in calls if call.kind == "thread"]
    # calls[0] and the threads share no completion token; thread 1 lies on the joined path
    assert supervised["completions"] == sum(len(c.completion) for c in calls)
    assert supervised["response"] == (
        len(ids) - prompt_length + sum(len(c.completion) for c in threads[1:])
    )


@pytest.fixture
def attention_calls(monkeypatch):
    """How often attention ran forward."""
    calls, forward = Counter(), native.forward

    def counted(*args):
        calls["forward"] += 1
        return forward(*args)

    monkeypatch.setattr(native, "forward", counted)
    return calls


@pytest.mark.parametrize("layers", [True, 1, 2])
def test_recomputed_layers_have_the_same_gradients_and_run_attention_once(layers, attention_calls):
    model = new_model(TOKENIZER, ARCHS["qwen3"], seed=2).train()
    trie = make_trie([encode((47, 86))], "response")
    want = gradients(model, trie_loss(model, trie))
    recompute_activations(model, layers)
    ran = []  # the layer of each MLP that started
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(0))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    attention_calls.clear()
    got = gradients(model, trie_loss(model, trie))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert attention_calls["forward"] == 2
    assert ran == ([0, 1, 0] if layers is not True and layers == 1 else [0, 1, 1, 0])


def test_more_layers_than_there_are_cannot_be_recomputed():
    model = new_model(TOKENIZER, ARCHS["qwen3"])
    with pytest.raises(ConfigError, match=r"gradient_checkpointing is 3: the model has 2 layers"):
        recompute_activations(model, 3)


def test_the_more_layers_are_recomputed_the_less_memory_a_step_takes():
    arch = {**ARCHS["qwen3"], "num_hidden_layers": 6}
    paths = [[first, *[7] * 50] for first in range(100)]
    trie = Trie.from_paths(paths, [[0.0] * 50 + [1.0]] * 100)
    peaks = []
    for layers in (0, 3, 6):
        model = new_model(TOKENIZER, arch, seed=2).train()
        recompute_activations(model, layers)
        peaks.append(peak_tensor_bytes(lambda model=model: trie_loss(model, trie).backward()))
    none, half, every = peaks
    assert every < 0.6 * half < 0.6 * 0.6 * none, peaks


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_share_one_graph_for_tries_of_all_sizes(backend, attention_calls):
    model = new_model(TOKENIZER, ARCHS["qwen3"], seed=3).train()
    tries = [make_trie([encode(factors)], "response") for factors in ((47, 86), (12, 345))]
    want = [gradients(model, trie_loss(model, trie)) for trie in tries]
    dynamo.reset()
    dynamo.utils.counters.clear()
    compile_layers(model, backend)
    recompute_activations(model)
    attention_calls.clear()
    for trie, wanted in zip(tries, want, strict=True):
        for name, gradient in gradients(model, trie_loss(model, trie)).items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert attention_calls["forward"] == 2 * len(tries)


def test_bfloat16_autocast_stays_close_to_float32():
    model = new_model(TOKENIZER, ARCHS["llama"], seed=4)
    trie = make_trie([encode((47, 86))], "response")
    want = trie_loss(model, trie)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = trie_loss(model, trie)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-2)


@pytest.mark.parametrize("fused", [True, False], ids=["linear_cross_entropy", "pieces"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_in_pieces_equals_that_of_whole_logits(fused, bias, monkeypatch):
    if not fused:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cpu", 500)
    torch.manual_seed(0)
    hidden = torch.randn(67, 24, requires_grad=True)
    head = torch.nn.Linear(24, 90, bias=bias)
    targets = torch.randint(0, 90, (67,))
    want = F.cross_entropy(head(hidden), targets, reduction="sum")
    want_grads = torch.autograd.grad(want, (hidden, head.weight))
    got = cross_entropy_sum(hidden, OutputLayer(head), targets)
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad(got, (hidden, head.weight))
    torch.testing.assert_close(got_grads, want_grads)


def test_a_saved_model_loads_in_plain_transformers_with_identical_logits(tmp_path):
    model = new_model(TOKENIZER, ARCHS["qwen3"], seed=5)
    save_model(model, TOKENIZER, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, tokenizer = load_model(tmp_path)
    ids = torch.tensor([encode((47, 86))[0]])
    model.set_attn_implementation("sdpa")
    ours.set_attn_implementation("sdpa")
    want = model(input_ids=ids).logits
    assert torch.equal(plain(input_ids=ids).logits, want)
    assert torch.equal(ours(input_ids=ids).logits, want)
    assert tokenizer("<Thread>\n1:").input_ids == TOKENIZER("<Thread>\n1:").input_ids


def test_same_seed_same_weights():
    first, second = (new_model(TOKENIZER, ARCHS["qwen3"], seed=6) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (
            Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]),
            "qwen3 models are not supported: layers of type 'linear_attention'",
        ),
        (Qwen3Config(attention_dropout=0.1), r"qwen3: config\.attention_dropout must be 0"),
    ],
)
def test_models_a_trie_cannot_use_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        check_supported(config)


def test_a_model_called_without_a_trie_says_what_to_do():
    model = new_model(TOKENIZER, ARCHS["qwen3"])
    with pytest.raises(ValueError, match="call it with trie_layout"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_a_path_without_a_model_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no model here; expected a Hugging Face folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "arch, message",
    [
        ({"model_type": "qwen33"}, r"model\.arch: .*qwen33"),
        ({**ARCHS["qwen3"], "hidden_size": "large"}, r"model\.arch: "),
    ],
)
def test_an_unknown_architecture_is_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        new_model(TOKENIZER, arch)
