"""Scripts of recorded trajectories: the state machine and the engine go through them again."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import CODEC, RandomModel, ids, randoms, unhurried, weaver_settings
from transformers import Qwen3Config, Qwen3ForCausalLM

from threadweaver.generate import Engine, GenerationSettings, Weaver
from threadweaver.generate.replay import script_of

PROMPT = ids("1:")
BLOCK = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>\n"


def recorded(random: Random, limits: dict) -> list[int]:
    """A finished response to PROMPT."""
    weaver, model = Weaver(PROMPT, CODEC, **limits), RandomModel(random)
    while not weaver.done:
        request = random.choice(weaver.requests())
        weaver.complete(request, *model(request))
    return weaver.response


@unhurried
@given(randoms, weaver_settings())
def test_the_state_machine_comes_to_the_response_by_its_script(random, limits):
    response = recorded(random, limits)
    replay = GenerationSettings(**limits)
    script = script_of(PROMPT + response, len(PROMPT), CODEC, replay)
    weaver = replay.weaver(PROMPT, CODEC, 10**6)
    unused = dict(script)
    while not weaver.done:
        request = random.choice(weaver.requests())
        tokens = unused.pop(request.id, [])
        stopped = tokens and tokens[-1] in request.stop_ids
        weaver.complete(request, tokens, "stop" if stopped else "length")
    assert weaver.response == response
    assert unused == {}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation="trie").eval()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(randoms, weaver_settings()), min_size=1, max_size=4))
def test_the_engine_comes_to_the_responses_by_their_scripts(model, records):
    engine = Engine(model, CODEC, num_pages=4000)
    responses = []
    for random, limits in records:
        response = recorded(random, limits)
        responses.append(response)
        for mode in ("parallel", "sequential"):
            replay = GenerationSettings(mode, **limits)
            script = script_of(PROMPT + response, len(PROMPT), CODEC, replay)
            engine.add(PROMPT, replay, script=script)
    rollouts = engine.run()
    assert [r.response for r in rollouts[0::2]] == responses
    assert [r.response for r in rollouts[1::2]] == responses
    assert all(r.num_sampled_tokens == len(r.response) for r in rollouts[1::2])


def test_the_script_of_sequential_mode_is_the_response():
    response = ids(f"a{BLOCK}<Thread>\n1:a</Thread><Thread>\n2:b</Thread>\n</Parallel><eos>")
    sequential = GenerationSettings("sequential")
    assert script_of(PROMPT + response, 2, CODEC, sequential) == {(0,): response}
    parallel = script_of(PROMPT + response, 2, CODEC, GenerationSettings())
    assert list(parallel) == [(0,), (0, 0, 0), (0, 1, 0), (1,)]
    assert parallel[0, 1, 0] == ids("b</Thread>")
    assert parallel[1,] == ids("</Parallel><eos>")


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        # A thread that no outline asked for, a missing one, a space between threads, no newline
        # after them, and text after the end.
        ("<Thread>\n1:a</Thread><Thread>\n3:b</Thread>\n", "token 24: .* with '3:b<"),
        ("<Thread>\n1:a</Thread>\n</Parallel>", "token 22: .* with '\\\\n</Par"),
        ("<Thread>\n1:a</Thread> <Thread>\n2:b</Thread>\n", "token 22: .* with ' <Thread>"),
        ("<Thread>\n1:a</Thread><Thread>\n2:b</Thread>a", "token 28: .* with 'a'"),
        ("<Thread>\n1:a</Thread><Thread>\n2:b</Thread>\n<eos>a", "token 30: .* comes to ''"),
    ],
)
def test_a_trajectory_that_the_state_machine_cannot_come_to_is_refused_where_it_errs(
    threads, message
):
    with pytest.raises(ValueError, match=message):
        script_of(PROMPT + ids(BLOCK + threads), len(PROMPT), CODEC, GenerationSettings())
