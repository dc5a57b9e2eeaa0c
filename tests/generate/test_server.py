"""`Weaver` over HTTP: token for token what the engine gives, and what a bad server comes to."""

from __future__ import annotations

import json
import weakref

import pytest
from tokenizers.processors import TemplateProcessing

from tests.completions_server import Fault, serve
from tests.products import (
    ARCH,
    CODEC,
    PROMPTS,
    RESPONSES,
    TOKENIZER,
    product_model,
    save_product_model,
)
from tests.trajectory.word_tokenizer import word_tokenizer
from threadweaver.generate import Engine, GenerationSettings, load
from threadweaver.generate.options import EngineSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.server.address import ServerError, ServerSettings
from threadweaver.generate.server.engine import ServerEngine, connect
from threadweaver.model import (
    add_tags,
    build_tokenizer,
    end_ids,
    load_model,
    new_model,
    save_model,
    trie_loss,
)
from threadweaver.model.loss import supervised_tokens
from threadweaver.trajectory import Codec, loss_trie

pytest.importorskip("openai")
GREEDY = SamplingParams(temperature=0)
ENCODED = [CODEC.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_product_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(folder):
    with serve(folder, "token_ids") as server:
        yield server


@pytest.fixture
def server(running):
    """The server as it was at first."""
    running.dialect, running.fault, running.names = "token_ids", None, ("tiny",)
    running.seconds, running.most_at_once, running.after = 0.0, 0, 0
    running.asked.clear()
    return running


def engine_at(server, at_once: int = 8, vocabulary: int = len(TOKENIZER), **settings):
    settings = ServerSettings(server.url, **{"timeout": 20.0, "retries": 0, **settings})
    return connect(settings, CODEC, vocabulary, 1024, parallel=True, at_once=at_once)


def by_both(engine: ServerEngine, prompts=ENCODED[:1], **limits) -> tuple[list, list]:
    """What decoding there and here comes to."""
    settings = GenerationSettings(**{"max_tokens": 300, "sampling": GREEDY, **limits})
    both = engine, Engine(product_model(), CODEC, kv_gigabytes=0.01)
    for one in both:
        for prompt in prompts:
            one.add(prompt, settings)
    there, here = (one.run() for one in both)
    return [
        [
            (r.response, [(c.request, c.context, c.tokens, c.reason) for c in r.completions])
            for r in rollouts
        ]
        + [r.limits for r in rollouts]
        for rollouts in (there, here)
    ]  # type: ignore


@pytest.mark.parametrize("dialect", ["token_ids", "generate", "logprobs", "text"])
def test_a_server_gives_token_for_token_what_the_engine_gives(server, dialect):
    server.dialect = dialect
    engine, note = engine_at(server)
    assert f"server: {server.url}, model tiny, prompts and replies as" in note
    assert ("text" in note) == (dialect == "text")
    there, here = by_both(engine, ENCODED)
    assert there == here
    assert [CODEC.decode(response[:-1]) for response, _ in there[: len(PROMPTS)]] == RESPONSES
    assert engine.unfinished == 0 and engine.run() == []
    sent = [body for body in server.asked if body.get("max_tokens", 300) > 8]
    assert all(not isinstance(body.get("prompt"), str) for body in sent) == (dialect != "text")


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 20}, {"max_thread_tokens": 5}, {"mode": "sequential"}, {"max_threads": 1}],
)
def test_limits_end_a_response_as_in_the_engine(server, limits):
    there, here = by_both(engine_at(server)[0], **limits)
    assert there == here


def test_a_run_keeps_nothing_of_what_another_takes(server):
    engine, _ = engine_at(server, at_once=2)
    settings = GenerationSettings(max_tokens=5, sampling=GREEDY)
    waiting = [engine.add(ENCODED[0], settings, seed=n) for n in range(8)]
    done, left = [], []

    def take(_: list) -> None:
        done.extend(weakref.ref(one) for one in waiting if one.weaver.done)
        waiting[:] = [one for one in waiting if not one.weaver.done]
        left.append(sum(one() is not None for one in done))

    assert engine.run(take, keep=False) == [] and len(done) == 8
    assert max(left) <= 3 and engine.run() == []


def test_threads_are_asked_for_at_once_and_no_more_than_may_be(server):
    server.seconds = 0.3
    engine, _ = engine_at(server, at_once=3)
    there, here = by_both(engine, ENCODED)
    assert there == here and server.most_at_once == 3
    generation = engine.add(ENCODED[0], GenerationSettings(max_tokens=300, sampling=GREEDY))
    [rollout] = engine.run()
    # Three requests one after another, two of them side by side.
    assert rollout.seconds > 0.9 and generation.weaver.done and rollout.decode_steps == 0


def test_a_failure_that_passes_is_asked_again(server):
    server.fault, server.after = Fault(status=503, times=2), 4
    engine, _ = engine_at(server, retries=3)
    there, here = by_both(engine)
    assert there == here and server.fault is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=500), r"/v1/completions: answers 500: .*I fail"),
        (Fault(status=404), r"/v1/completions: answers 404"),
        (Fault(body=b"hello"), "no JSON"),
        (Fault(body=b"[1]"), "no JSON object"),
        (Fault(body=b"{}"), "no completion: {}"),
        (Fault(body=b'{"choices": [{"text": 3, "token_ids": []}]}'), "no completion"),
        (
            Fault(body=b'{"choices": [{"text": "", "token_ids": [1.5], "finish_reason": "stop"}]}'),
            "no completion",
        ),
        (
            Fault(body=b'{"choices": [{"text": "", "token_ids": [9], "finish_reason": "abort"}]}'),
            "ended by 'abort'",
        ),
        (
            Fault(
                body=b'{"choices": [{"text": "", "token_ids": [9999], "finish_reason": "stop"}]}'
            ),
            "gave the token 9,999, and the tokenizer of --model has ids up to 319",
        ),
        (Fault(seconds=8.0), r"no answer in time \(server_timeout\)"),
    ],
)
def test_a_server_that_fails_while_it_decodes_is_named_in_one_line(server, fault, message):
    engine, _ = engine_at(server, timeout=4.0 if fault.seconds else 20.0)
    server.fault, server.after = fault, len(server.asked) + 1
    with pytest.raises(ServerError, match=message) as error:
        by_both(engine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dialect", ["token_ids", "text"])
@pytest.mark.parametrize("finish", ["abort", "content_filter", None])
def test_a_request_that_the_server_gave_up_is_no_limit(server, dialect, finish):
    server.dialect = dialect
    engine, _ = engine_at(server)
    choice = {"text": "1", "token_ids": CODEC.encode("1"), "finish_reason": finish}
    server.fault = Fault(body=json.dumps({"choices": [choice]}).encode())
    with pytest.raises(ServerError, match=f"ended by {finish!r}: it was not completed"):
        by_both(engine)


def test_what_cannot_be_a_server_for_this_model_is_refused_before_it_decodes(server, folder):
    with pytest.raises(ServerError, match="cannot be reached"):
        engine_at(server.__class__("http://127.0.0.1:1", None, CODEC, "text"))
    with pytest.raises(ServerError, match="no model 'big': it offers tiny"):
        engine_at(server, model="big")
    server.names = "a", "b"
    with pytest.raises(ServerError, match="name one of the server's models: a, b"):
        engine_at(server)
    engine_at(server, model="b")
    server.names = ("tiny",)
    with pytest.raises(
        ServerError, match="the tokenizer of --model has ids up to 2: it runs another"
    ):
        engine_at(server, vocabulary=3)
    server.fault = Fault(body=b"<html>")
    with pytest.raises(ServerError, match="no JSON"):
        engine_at(server)
    server.fault = Fault(status=401)
    with pytest.raises(ServerError, match="answers 401"):
        engine_at(server)
    for wrong, name in (
        ({"url": "localhost"}, "server is 'localhost': give its address"),
        ({"url": "http://localhost:99999"}, "server is 'http://localhost:99999': Port out"),
        ({"url": "http:///v1"}, "server is"),
        ({"timeout": 0}, "server_timeout"),
    ):
        with pytest.raises(ValueError, match=name):
            ServerSettings(**{"url": "http://x", **wrong})


def test_a_server_of_text_gets_all_sampling_that_is_asked_for(server):
    server.dialect = "text"
    engine, _ = engine_at(server)
    asked = {"top_p": 0.5, "top_k": 3, "min_p": 0.25}
    for sampling in (SamplingParams(temperature=0, **asked), GREEDY):
        engine.add(ENCODED[0], GenerationSettings(max_tokens=1, sampling=sampling))
        assert engine.unfinished == 1
        engine.run()
        assert engine.unfinished == 0
    *_, truncated, greedy = server.asked
    assert {name: truncated[name] for name in asked} == asked
    assert not {"top_k", "min_p"} & set(greedy)


def test_a_server_of_text_adds_what_begins_a_text_and_one_of_ids_gets_it(server):
    tokenizer, start = build_tokenizer(), "<|reserved-0|>"
    made = TemplateProcessing(f"{start} $A", special_tokens=[(start, tokenizer.get_vocab()[start])])
    tokenizer.backend_tokenizer.post_processor = made
    codec = Codec.from_tokenizer(tokenizer)
    prompt = codec.encode_prompt(PROMPTS[0])
    for dialect, sent in (("token_ids", prompt), ("text", PROMPTS[0])):
        server.dialect = dialect
        settings = ServerSettings(server.url, timeout=20.0, retries=0)
        engine, _ = connect(settings, codec, len(tokenizer), 1024, parallel=True, at_once=1)
        engine.add(prompt, GenerationSettings(max_tokens=1, sampling=GREEDY))
        engine.run()
        assert server.asked[-1]["prompt"] == sent


def test_ids_beyond_the_number_of_tokens_are_the_tokenizers_too(tmp_path, monkeypatch):
    tokenizer = word_tokenizer(gap=100)
    save_model(new_model(tokenizer, ARCH), tokenizer, tmp_path)
    monkeypatch.setattr(load, "connect", lambda *given, **named: (given[2], ""))
    settings = ServerSettings("http://localhost:1")
    vocabulary, *_ = load.load_server(str(tmp_path), settings, EngineSettings(), parallel=False)
    assert vocabulary == 364 > len(tokenizer)


def test_another_tokenizer_is_found_by_the_text_of_its_tokens(server):
    text = b'{"choices": [{"text": "never", "token_ids": [40, 41], "finish_reason": "length"}]}'
    server.fault = Fault(body=text)
    with pytest.raises(ServerError, match=r"another than that of --model: the tokens \[40, 41\]"):
        engine_at(server)


@pytest.mark.slow
def test_smollm2_with_tags_over_http_equals_the_engine(smollm2, tmp_path):
    """Taught one trajectory first, since a model that has just got the tags opens no thread."""
    import torch

    model, tokenizer = load_model(smollm2)
    add_tags(tokenizer, model)
    codec = Codec.from_tokenizer(tokenizer, end_ids(model))
    prompt = codec.encode_prompt("What is 7*86?")
    ids = [*prompt, *codec.encode(RESPONSES[0]), codec.eos_id]
    trie = loss_trie(ids, codec, len(prompt), "response").trie
    layout, supervised = trie.layout("cpu"), supervised_tokens(trie).numel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(15):
        loss = trie_loss(model, trie, layout) / supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model.eval(), tokenizer, tmp_path)
    settings = GenerationSettings(max_tokens=250, sampling=GREEDY)
    prompts = [codec.encode_prompt(f"What is {a}*86?") for a in (7, 19)]
    here = Engine(model, codec, kv_gigabytes=0.5)
    with serve(tmp_path, "token_ids") as server:
        there, _ = connect(
            ServerSettings(server.url), codec, len(tokenizer), 8192, parallel=True, at_once=4
        )
        for engine in (here, there):
            for one in prompts:
                engine.add(one, settings)
        ours, theirs = here.run(), there.run()
    assert [r.response for r in theirs] == [r.response for r in ours]
    assert sum(len(r.completions) for r in ours) > 2 * len(prompts)  # threads were opened
