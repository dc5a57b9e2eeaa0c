"""The engine on real models, against plain transformers and against the trainer."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import TRAJECTORIES
from rollouts import CODEC, EOS, VOCAB, ids
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from threadweaver.generate import Engine, GenerationSettings, Rollout
from threadweaver.generate.engine import NonFiniteLogits
from threadweaver.generate.replay import script_of
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.transcript import transcript
from threadweaver.model import attention, output_layer, trie_hidden_states
from threadweaver.trajectory import Codec, extract_calls
from tw_kernels import Trie

GREEDY = SamplingParams(temperature=0)
# The model is so sure of what it knows that it takes some heat to make it stray.
UNSURE = SamplingParams(temperature=2, min_p=0.01)
OUTLINES_END, THREAD_END = VOCAB["</Outlines>"], VOCAB["</Thread>"]


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as plain transformers runs them."""
    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def random_model(**fields) -> PreTrainedModel:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, head_dim=16, max_position_embeddings=2048, eos_token_id=EOS,
        initializer_range=0.2, **{"num_key_value_heads": 2, **fields},
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation="trie").eval()


def greedy_by_transformers(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, eos_id: int
) -> list[list[int]]:
    """One batch, padded on the left, as its documentation has it."""
    width = max(map(len, prompts))
    out = model.generate(  # pyright: ignore[reportCallIssue] (declared on a mixin as a module)
        input_ids=torch.tensor([[eos_id] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos_id, pad_token_id=eos_id
        ),
    )
    assert isinstance(out, Tensor)
    rows = out[:, width:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


class SlowOrchestrator:
    """docs/semantics.md, "State machine", with a forward pass over the context for each token."""

    def __init__(self, model: PreTrainedModel, max_depth: int):
        self.model = model
        self.max_depth = max_depth

    def decode(self, context: list[int], stops: set[int]) -> list[int]:
        tokens: list[int] = []
        while not tokens or tokens[-1] not in stops:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([context + tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def line(self, context: list[int], stops: set[int], depth: int) -> list[int]:
        """All tokens of a line after its context, joined."""
        line: list[int] = []
        while True:
            opens = {OUTLINES_END} if depth < self.max_depth else set()
            line += self.decode(context + line, stops | opens)
            if line[-1] != OUTLINES_END:
                return line
            text = CODEC.decode(line).rpartition("<Outlines>")[2]
            numbers = dict.fromkeys(re.findall(r"<Outline>\s*([0-9]+)\s*:", text))
            if not numbers:
                continue
            joined = ids("\n")
            for number in numbers:
                header = ids(f"<Thread>\n{number}:")
                thread = self.line(
                    context + line + ids("\n") + header, {THREAD_END, EOS}, depth + 1
                )
                joined += header + thread
            line += joined + ids("\n")


def test_greedy_parallel_decoding_equals_full_recomputation_token_for_token(fork_join_model):
    slow = SlowOrchestrator(plain(fork_join_model), max_depth=2)
    expected = [slow.line(ids(prompt), {EOS}, 0) for prompt in TRAJECTORIES]
    # The memorised trajectories have the blocks that this test is about.
    assert [CODEC.decode(e) for e in expected] == [f"{t}<eos>" for t in TRAJECTORIES.values()]
    engine = Engine(fork_join_model, CODEC, num_pages=500, page_size=4)
    for prompt in TRAJECTORIES:
        engine.add(ids(prompt), GenerationSettings(max_tokens=500, max_depth=2, sampling=GREEDY))
    assert [rollout.response for rollout in engine.run()] == expected
    assert engine.pool.free_pages == 500


def test_one_level_of_blocks_leaves_deeper_ones_to_the_thread_itself(fork_join_model):
    slow = SlowOrchestrator(plain(fork_join_model), max_depth=1)
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    for prompt in ("1:", "2:", "3:"):
        engine.add(ids(prompt), GenerationSettings(max_tokens=500, sampling=GREEDY))
    for prompt, rollout in zip(("1:", "2:", "3:"), engine.run(), strict=True):
        assert rollout.response == slow.line(ids(prompt), {EOS}, 0)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_greedy_sequential_decoding_equals_transformers_generate(kv_heads):
    model = random_model(num_key_value_heads=kv_heads)
    generator = torch.Generator().manual_seed(kv_heads)
    prompts = [
        torch.randint(0, 100, (n,), generator=generator).tolist()
        for n in torch.randint(1, 90, (16,), generator=generator).tolist()
    ]
    expected = greedy_by_transformers(plain(model), prompts, 200, EOS)
    engine = Engine(model, CODEC, num_pages=400, max_batch_tokens=64)
    settings = GenerationSettings("sequential", max_tokens=200, sampling=GREEDY)
    for prompt in prompts:
        engine.add(prompt, settings)
    assert [rollout.response for rollout in engine.run()] == expected


def test_256_rollouts_through_a_pool_that_holds_a_tenth_of_them(fork_join_model):
    lengths = torch.randint(1, 200, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids(prompt) for prompt in TRAJECTORIES]
    peak = 0

    def decode(num_pages: int) -> tuple[list[Rollout], Engine]:
        def watch(_tokens) -> None:
            nonlocal peak
            peak = max(peak, num_pages - engine.pool.free_pages)

        engine = Engine(fork_join_model, CODEC, page_size=4, num_pages=num_pages, max_sequences=999)
        for i, length in enumerate(lengths):
            settings = GenerationSettings(max_tokens=length, max_depth=2, sampling=UNSURE)
            engine.add(prompts[i % len(prompts)], settings, seed=i)
        return engine.run(watch), engine

    expected, _ = decode(30_000)
    tenth = peak // 10
    got, engine = decode(tenth)
    assert [r.response for r in got] == [r.response for r in expected]
    assert [r.limits for r in got] == [r.limits for r in expected]
    assert engine.preemptions > 0
    assert engine.pool.free_pages == tenth


def trainer_logprobs(model: PreTrainedModel, rollout: Rollout) -> list[Tensor]:
    """log p of each completion's tokens in one trie of all of them, [n] each."""
    paths = [c.context + c.tokens for c in rollout.completions]
    trie = Trie.from_paths(paths)
    with torch.no_grad():
        hidden = trie_hidden_states(model, trie, trie.layout("cpu"))
        logprobs = output_layer(model)(hidden).float().log_softmax(-1)
    out = []
    for i, completion in enumerate(rollout.completions):
        nodes = torch.as_tensor(trie.path_nodes(i))[len(completion.context) :]
        out.append(logprobs[trie.parents[nodes], trie.tokens[nodes]])
    return out


def test_sampled_log_probabilities_are_those_of_the_trie_trainer(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=2000)
    settings = GenerationSettings(max_tokens=300, max_depth=2)
    for i in range(30):
        # Prompts that it knows and others, after which it is unsure.
        engine.add(ids(["1:", "4:", "x", "0ab", ". "][i % 5]), settings, seed=i)
    differences = []
    for rollout in engine.run():
        for completion, expected in zip(
            rollout.completions, trainer_logprobs(fork_join_model, rollout), strict=True
        ):
            assert completion.sampled_logprobs == completion.logprobs
            differences.append((torch.tensor(completion.logprobs) - expected).abs())
    differences = torch.cat(differences)
    assert differences.numel() > 1000
    assert differences.max() <= 1e-4 and differences.mean() <= 1e-5


def test_the_completions_of_a_rollout_are_the_calls_of_its_trajectory(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    for prompt in TRAJECTORIES:
        engine.add(ids(prompt), GenerationSettings(max_tokens=500, max_depth=2, sampling=GREEDY))
    for rollout in engine.run():
        trajectory = rollout.prompt + rollout.response
        calls = extract_calls(trajectory, CODEC, len(rollout.prompt), max_depth=2)
        got = {(tuple(c.context), tuple(c.tokens)) for c in rollout.completions}
        assert got == {(tuple(c.context), tuple(c.completion)) for c in calls}
        assert rollout.num_sampled_tokens == sum(c.completion_length for c in calls)


def test_a_seed_gives_the_same_response_whatever_else_is_decoded(fork_join_model):
    settings = GenerationSettings(max_tokens=200, max_depth=2, sampling=UNSURE)

    def respond(seeds: list[int], **sizes) -> dict[int, list[int]]:
        engine = Engine(fork_join_model, CODEC, num_pages=2000, **sizes)
        for seed in seeds:
            engine.add(ids("2:"), settings, seed=seed)
        return {seed: r.response for seed, r in zip(seeds, engine.run(), strict=True)}

    together = respond([0, 1, 2, 3, 4, 5])
    backwards = respond([5, 3, 1], max_sequences=2, max_batch_tokens=5)
    assert backwards == {seed: together[seed] for seed in (5, 3, 1)}
    assert len({tuple(response) for response in together.values()}) == 6


def test_the_weights_of_the_model_are_read_where_they_are(fork_join_model):
    twin = random_model(tie_word_embeddings=True)
    engine = Engine(twin, CODEC, num_pages=100)
    settings = GenerationSettings("sequential", max_tokens=30, sampling=GREEDY)
    engine.add(ids("1:"), settings)
    (before,) = engine.run()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    engine.free()
    engine.add(ids("1:"), settings)
    (after,) = engine.run()
    assert after.response == greedy_by_transformers(plain(twin), [ids("1:")], 30, EOS)[0]
    assert after.response != before.response


def test_logits_that_are_not_finite_stop_with_the_request_named(fork_join_model):
    model = random_model()
    engine = Engine(model, CODEC, num_pages=100)
    engine.add(ids("1:"), GenerationSettings(max_tokens=30))
    with torch.no_grad():
        output_layer(model).weight[5, 3] = torch.nan
    with pytest.raises(NonFiniteLogits, match=r"generation 0, request \(0,\).*after 2 tokens"):
        engine.run()


def test_an_engine_whose_step_was_interrupted_says_so_and_decodes_no_more(
    fork_join_model, monkeypatch
):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    engine.add(ids("1:"), GenerationSettings(max_tokens=30))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "read", MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.run()
    with pytest.raises(RuntimeError, match="interrupted: make a new engine"):
        engine.run()


def test_every_end_token_of_the_codec_ends_a_response(fork_join_model):
    codec = Codec.from_vocab(VOCAB, eos_id=EOS, end_ids=ids("x"))
    engine = Engine(fork_join_model, codec, num_pages=500)
    settings = GenerationSettings(max_tokens=500, sampling=GREEDY)
    generation = engine.add(ids("2:"), settings)
    (rollout,) = engine.run()
    assert rollout.response == ids(TRAJECTORIES["2:"])  # which ends in x
    assert rollout.completions[-1].reason == "eos"
    assert transcript(generation, codec) == rollout.response[:-1]
    assert script_of(rollout.prompt + rollout.response, 2, codec, settings) == {
        completion.request: completion.tokens for completion in rollout.completions
    }


def test_an_engine_that_is_stepped_keeps_nothing_of_what_is_done(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    settings = GenerationSettings(max_tokens=8, sampling=GREEDY)

    def serve(count: int) -> None:
        for seed in range(count):
            generation = engine.add(ids(f"{seed % 5}:"), settings, seed=seed)
            while not generation.weaver.done:
                engine.step()

    def kept() -> tuple[int, list[int]]:
        gc.collect()
        ours = [
            o for o in gc.get_objects() if str(type(o).__module__).startswith("threadweaver.gen")
        ]
        return len(ours), [len(x) for x in vars(engine).values() if isinstance(x, list | dict)]

    at_first = kept()
    serve(20)
    assert kept() == at_first
    assert engine.run() == []


def test_run_keeps_nothing_of_what_another_takes(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=500, max_sequences=4)
    settings = GenerationSettings(max_tokens=100, sampling=GREEDY)
    waiting = [engine.add(ids(f"{n % 5}:"), settings, seed=n) for n in range(20)]
    done: list[weakref.ref] = []
    families: list[weakref.ref] = []
    left: list[int] = []

    def take(tokens: list) -> None:
        left.append(sum(one() is not None for one in done))
        for generation in [one for one in waiting if one.weaver.done]:
            waiting.remove(generation)
            # Of the lines of a response too, since those of a block refer to each other.
            done.extend(map(weakref.ref, (generation, generation.weaver._main)))
            families.append(weakref.ref(generation.family))

    gc.disable()
    try:
        assert engine.run(take, keep=False) == []
        assert not any(one() for one in (*done, *families))
    finally:
        gc.enable()
    assert len(done) == 40 and set(left) == {0}
    last = engine.add(ids("1:"), settings)
    assert engine.run() == [last.rollout()]


def test_run_returns_what_it_decodes_itself_and_each_only_once(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    settings = GenerationSettings(max_tokens=8, sampling=GREEDY)
    first = engine.add(ids("1:"), settings)
    while engine.has_work:
        engine.step()
    second = engine.add(ids("2:"), settings)
    done_at_once = engine.add(ids("2:"), settings, script={})
    assert engine.run() == [second.rollout(), done_at_once.rollout()]
    assert engine.run() == []
    assert first.rollout().response == ids(TRAJECTORIES["1:"])[:8]


@pytest.mark.parametrize("bad", [1.5, True, None, "1", np.float64(1.0), -1, 128])
def test_ids_that_the_model_has_no_row_for_are_refused_and_named(fork_join_model, bad):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    settings = GenerationSettings(max_tokens=8)
    named = rf"id 1 is {re.escape(repr(bad))}: "
    with pytest.raises(ValueError, match=f"prompt: {named}"):
        engine.add([1, bad], settings)
    with pytest.raises(ValueError, match=rf"script, request \(0,\): {named}"):
        engine.add([1], settings, script={(0,): [1, bad]})
    assert not engine.has_work


def test_a_response_that_the_pool_cannot_hold_says_what_would_make_room(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=1)
    settings = GenerationSettings(max_tokens=100)
    with pytest.raises(ValueError, match="lower max_tokens, or give more kv_gigabytes"):
        engine.check([1], settings)
    # Of a GPU auto takes all that a step leaves.
    engine._model = SimpleNamespace(device=torch.device("cuda", 0))  # type: ignore
    with pytest.raises(ValueError, match="max_tokens, or lower max_sequences and max_batch_tokens"):
        engine.check([1], settings)


def test_a_response_ends_where_the_context_does_and_a_line_says_so(fork_join_model):
    engine = Engine(fork_join_model, CODEC, num_pages=500)
    settings = GenerationSettings(max_tokens=2000)
    room = engine.check([1] * 1000, settings)
    assert room == 24
    note = settings.context_note(room, engine.context_length)
    assert note is not None and "24 and not 2,000" in note and "ends at 1,024" in note
    assert settings.context_note(2000, engine.context_length) is None
    generation = engine.add([1] * 1000, settings)
    assert len(generation.weaver.requests()[0].context) == 1000
    assert generation.weaver.requests()[0].max_tokens == 24


def test_an_engine_without_room_for_anything_is_refused(fork_join_model):
    with pytest.raises(ValueError, match="kv_gigabytes is 1e-09"):
        Engine(fork_join_model, CODEC, kv_gigabytes=1e-9)
    for name in ("max_sequences", "max_batch_tokens", "page_size", "num_pages"):
        sizes: dict[str, Any] = {"num_pages": 10, name: 0}
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Engine(fork_join_model, CODEC, **sizes)


def test_new_values_go_from_their_projection_to_attention_without_a_copy(monkeypatch):
    """Keys and queries from the rotary embedding likewise: no step makes them contiguous."""
    model = random_model()
    engine = Engine(model, CODEC, num_pages=100)
    made, taken = [], []
    own = engine._runner._weights.model
    for layer in own.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *a: made.append(a[2].data_ptr()))
    op = attention.trie_decode

    def spy(q, kv, plan, scale, new_k, new_v, **variant):
        taken.append(new_v.data_ptr())
        assert q.stride(-1) == new_k.stride(-1) == new_v.stride(-1) == 1
        return op(q, kv, plan, scale, new_k=new_k, new_v=new_v, **variant)

    monkeypatch.setattr(attention, "trie_decode", spy)
    engine.add(ids("1:"), GenerationSettings(max_tokens=5))
    engine.run()
    assert taken == made and len(made) == 3 * engine.counts.steps
