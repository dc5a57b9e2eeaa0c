"""Responses that are kept as they come: a command that was stopped or killed goes on."""

from __future__ import annotations

import gc
import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from tests.held import Held
from tests.products import CODEC, PROMPTS, RESPONSES, product_model, save_product_model
from threadweaver.data import DataError, load_examples, save_rows
from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.__main__ import main
from threadweaver.generate.response_log import Key, LogError, ResponseLog, difference
from threadweaver.generate.sampler import SamplingParams

SETTINGS = GenerationSettings(max_tokens=300, sampling=SamplingParams(temperature=0))
WANTED = {"samples": 2, "generation": {"max_tokens": 300}}


@pytest.fixture(scope="module")
def rollout():
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01)
    engine.add(CODEC.encode(PROMPTS[0]), SETTINGS)
    return engine.run()[0]


@pytest.fixture
def begun(tmp_path, rollout):
    """A log of one response, as a process that was killed leaves it."""
    target = tmp_path / "r.jsonl"
    log = ResponseLog(target, WANTED)
    log.add(Key("parallel", 3, 1), rollout, RESPONSES[0], 2.5)
    log.close(remove=False)
    return target


def test_a_response_is_made_again_as_it_was_decoded(begun, rollout):
    log = ResponseLog(begun, WANTED)
    assert list(log.rows) == [Key("parallel", 3, 1)]
    assert log.elapsed("parallel") == 2.5 and log.elapsed("sequential") == 0
    again = log.rollout(Key("parallel", 3, 1), rollout.prompt, SETTINGS, CODEC, 1024)
    for name in ("prompt", "response", "limits", "decode_steps", "seconds", "num_sampled_tokens"):
        assert getattr(again, name) == getattr(rollout, name)
    for made, decoded in zip(again.completions, rollout.completions, strict=True):
        assert (made.request, made.context) == (decoded.request, decoded.context)
        assert (made.tokens, made.reason) == (decoded.tokens, decoded.reason)


def test_responses_are_read_while_others_are_added(begun, rollout):
    log = ResponseLog(begun, WANTED)
    keys = [Key("parallel", 3, 1), Key("sequential", 0, 0), Key("parallel", 4, 0)]
    for number, key in enumerate(keys[1:], 2):
        log.add(key, replace(rollout, decode_steps=number), "é" * number, number)
        for earlier in keys[:number]:
            again = log.rollout(earlier, rollout.prompt, SETTINGS, CODEC, 1024)
            assert again.response == rollout.response
            if earlier != keys[0]:
                assert again.decode_steps == keys.index(earlier) + 1
    rows = log.rows
    assert list(rows) == keys and (log.elapsed("parallel"), log.elapsed("sequential")) == (3, 2)
    log.close(remove=False)
    again = ResponseLog(begun, WANTED)
    assert again.rows == rows and again.elapsed("parallel") == 3
    again.close(remove=False)


def test_a_log_holds_less_of_a_response_than_its_tokens(tmp_path, rollout):
    [first, *_] = rollout.completions
    long = replace(rollout, completions=[replace(first, tokens=[7] * 2000)])
    gc.collect()
    tracemalloc.start()
    try:
        log = ResponseLog(tmp_path / "r.jsonl", WANTED)
        for number in range(200):
            log.add(Key("parallel", number, 0), long, "a" * 2000, 1.0)
        written = tracemalloc.get_traced_memory()[0]
        log.close(remove=False)
        del log
        tracemalloc.clear_traces()
        again = ResponseLog(tmp_path / "r.jsonl", WANTED)
        read = tracemalloc.get_traced_memory()[0]
        assert len(again.rows) == 200 and max(written, read) < 200 * 1000
        again.close(remove=False)
    finally:
        tracemalloc.stop()


def test_what_was_written_when_it_was_killed_is_dropped_and_written_again(begun, rollout):
    path = begun.with_name("r.jsonl.partial")
    whole = path.read_bytes()
    for torn in (b'{"key": ["parallel", 4', b'{"key": ["parallel", 4, 0], "elapsed": 9}'):
        path.write_bytes(whole + torn)
        log = ResponseLog(begun, WANTED)
        assert list(log.rows) == [Key("parallel", 3, 1)] and path.read_bytes() == whole
        log.add(Key("parallel", 4, 0), rollout, "", 3.0)
        log.close(remove=False)
        again = ResponseLog(begun, WANTED)
        assert len(again.rows) == 2
        again.close(remove=False)
    path.write_bytes(whole[:20])  # killed while it wrote its settings
    log = ResponseLog(begun, WANTED)
    assert not log.rows and path.read_bytes().count(b"\n") == 1
    log.close(remove=True)
    assert not path.exists()


def test_other_settings_are_refused_by_name_unless_it_starts_afresh(begun):
    other = {"samples": 2, "generation": {"max_tokens": 50}}
    with pytest.raises(LogError, match=r"begun with generation.max_tokens 300, not 50: .*--over"):
        ResponseLog(begun, other)
    log = ResponseLog(begun, other, restart=True)
    assert not log.rows
    log.close(remove=False)
    assert not ResponseLog(begun, other).rows
    assert difference({"a": [1]}, {"a": [1]}) is None
    assert difference({"a": 1}, {"b": 2}) == "b null, not 2"


def test_a_damaged_line_and_a_second_process_are_refused(begun):
    first = ResponseLog(begun, WANTED)
    with pytest.raises(LogError, match="in use by another process"):
        ResponseLog(begun, WANTED)
    first.close(remove=False)
    path = begun.with_name("r.jsonl.partial")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(LogError, match=r"r.jsonl.partial:2: damaged; delete the file"):
        ResponseLog(begun, WANTED)
    row = json.loads(lines[1])
    row["completions"].pop()
    path.write_bytes(lines[0] + json.dumps(row).encode() + b"\n")
    log = ResponseLog(begun, WANTED)
    with pytest.raises(LogError, match="problem 4, sample 2 cannot be made again"):
        log.rollout(Key("parallel", 3, 1), CODEC.encode(PROMPTS[0]), SETTINGS, CODEC, 1024)


def test_a_full_disk_is_told_once_and_what_it_does_not_take_does_not_count(begun, rollout, capsys):
    log = ResponseLog(begun, WANTED)
    log._file.close()
    log._file = Path("/dev/full").open("ab")  # noqa: SIM115
    for sample in (2, 3):
        log.add(Key("parallel", 3, sample), rollout, "", 3.0)
    [key] = log.rows
    again = log.rollout(key, rollout.prompt, SETTINGS, CODEC, 1024)
    assert key == Key("parallel", 3, 1) and again.response == rollout.response
    log.close(remove=False)
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1
    assert "r.jsonl.partial: No space left on device: it keeps no more responses" in error


# python -m threadweaver.generate --data FILE --out FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_product_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def answer(folder, tmp_path):
    """Answers a file with both products, the first of them twice; options given later win."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": PROMPTS[0], "ground_truth": "602"}, {"problem": PROMPTS[1]}]
    rows += [{"question": "1" * 1024}, {"prompt": [{"role": "user", "content": PROMPTS[0]}]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options: str, out: str = "out.jsonl") -> int:
        fixed = f"--model {folder} --temperature 0 --kv_gigabytes 0.01 --max_tokens 300"
        fixed += f" --device cpu --precision fp32 --data {data} --out {tmp_path / out}"
        return main([*fixed.split(), *options])

    return run


def test_every_row_of_a_file_is_answered_in_the_columns_of_training(answer, tmp_path, capsys):
    assert answer("--n", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [RESPONSES[i] for i in (0, 0, 1, 1, 0, 0)]
    assert [row["sample"] for row in rows] == [0, 1] * 3
    assert rows[0]["reward_model"]["ground_truth"] == "602" and "reward_model" not in rows[2]
    assert rows[0]["qwen_text"] == PROMPTS[0] + RESPONSES[0] and rows[0]["blocks"] == 1
    assert rows[2]["source"] == f"{tmp_path / 'data.jsonl'}:2"
    error = capsys.readouterr().err
    assert "1 of 4 prompts are skipped: " in error and "data.jsonl:3: the prompt has" in error
    assert f"{tmp_path / 'out.jsonl'}: 6 responses" in error
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_file_is_asked_as_in_training_and_a_prompt_as_it_is_given(
    answer, folder, tmp_path, capsys
):
    asked = [json.dumps(prompt) for prompt in PROMPTS]
    template = f"{{{{ {asked[0]} if 'step by step' in messages[-1].content else {asked[1]} }}}}"
    chat = shutil.copytree(folder, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(template)

    def responses(*options: str) -> set[str]:
        assert answer("--model", str(chat), "--overwrite", *options) == 0
        rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        return {row["response"] for row in rows}

    assert responses() == {RESPONSES[0]}
    assert responses("--template.instruction", "") == {RESPONSES[1]}
    fixed = f"--model {chat} --temperature 0 --kv_gigabytes 0.01 --max_tokens 300 --device cpu"
    for options, response in (((), 1), (("--template.instruction", "Go step by step."), 0)):
        capsys.readouterr()
        assert main([*fixed.split(), "--precision", "fp32", "--prompt", "1", *options]) == 0
        assert capsys.readouterr().out == RESPONSES[response] + "\n"


def test_a_file_that_was_begun_is_finished_and_comes_out_the_same(
    answer, tmp_path, monkeypatch, capsys
):
    hot = ("--n", "3", "--temperature", "2", "--max_tokens", "30", "--max_sequences", "4")
    assert answer(*hot, out="whole.jsonl") == 0
    with monkeypatch.context() as patch:
        step, count = Engine.step, iter(range(50))

        def interrupted(self):
            if next(count) == 40:
                raise KeyboardInterrupt
            return step(self)

        patch.setattr(Engine, "step", interrupted)
        assert answer(*hot) == 130
    kept = (tmp_path / "out.jsonl.partial").read_text().count("\n") - 1
    assert 0 < kept < 9 and not (tmp_path / "out.jsonl").exists()
    assert f"{kept} responses are kept: give the same command" in capsys.readouterr().err
    assert answer(*hot, "--seed", "1") == 2
    assert "begun with seed 0, not 1" in capsys.readouterr().err
    assert answer(*hot) == 0
    assert f"{kept} responses are there already" in capsys.readouterr().err
    texts = [
        [json.loads(line)["response"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "whole.jsonl")
    ]
    assert texts[0] == texts[1]


def test_of_a_response_that_is_done_the_row_alone_is_held(answer, tmp_path, monkeypatch, capsys):
    def refuse(rows, path):
        raise DataError(f"{path}: a reason")

    many = ("--n", "10", "--max_tokens", "20", "--max_sequences", "4")
    with monkeypatch.context() as patch:
        patch.setattr("threadweaver.data.save_rows", refuse)
        held = Held(patch)
        assert answer(*many) == 2
        assert held.count >= 2 * 30 and held.most <= 8
    with monkeypatch.context() as patch:
        held = Held(patch)
        assert answer(*many) == 0
        assert held.count >= 30 and held.most <= 2
    assert "30 responses are there already" in capsys.readouterr().err
    assert answer(*many, out="again.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a"], "prompt: give it, or --data, and not both"),
        (["--json"], "json: with --data"),
        (["--n", "0"], "n is 0"),
        (["--out", "no/such/o.jsonl"], "no such folder"),
        (["--out", "o.txt"], "name it .jsonl or .parquet"),
        (["--data", "no.jsonl"], "no.jsonl: no such file"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(answer, capsys, options, message):
    assert answer(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_rows_with_one_right_answer_and_with_several_are_answered_as_parquet(answer, tmp_path):
    rows = [{"question": PROMPTS[0], "answer": a} for a in (["602"], ["602", "603"])]
    save_rows(rows, tmp_path / "lists.jsonl")
    data = ("--data", str(tmp_path / "lists.jsonl"), "--max_tokens", "3")
    assert answer(*data, out="out.parquet") == 0
    found = load_examples(tmp_path / "out.parquet")
    assert [e.ground_truth for e in found] == ["602", ("602", "603")]


def test_responses_that_cannot_be_written_are_kept_for_another_file(
    answer, tmp_path, monkeypatch, capsys
):
    def refuse(rows, path):
        raise DataError(f"{path}: parquet cannot hold these rows (a reason); write .jsonl")

    with monkeypatch.context() as patch:
        patch.setattr("threadweaver.data.save_rows", refuse)
        assert answer("--max_tokens", "3", out="a.parquet") == 2
    kept = tmp_path / "a.parquet.partial"
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"rename {kept} to NAME.jsonl.partial" in error and "--out NAME.jsonl" in error
    kept.rename(tmp_path / "b.jsonl.partial")
    assert answer("--max_tokens", "3", out="b.jsonl") == 0
    assert "3 responses are there already" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten_unasked(answer, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine\n")
    assert answer("--max_tokens", "3") == 2
    assert "out.jsonl: there already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert answer("--overwrite", out="data.jsonl") == 2
    assert "data.jsonl is a file of --data" in capsys.readouterr().err
    assert answer("--max_tokens", "3", "--overwrite") == 0
    assert (tmp_path / "out.jsonl").read_text() != "mine\n"
