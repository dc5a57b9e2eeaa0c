"""`python -m threadweaver.annotate` against a server of the tests: all steps, and what is left out
on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.annotate.problems import gym_rows, save_student, write_rows
from tests.annotate.stub import Fault, Messages, StubServer, right
from threadweaver.annotate.__main__ import main
from threadweaver.annotate.run import Run
from threadweaver.annotate.store import Store
from threadweaver.train.__main__ import main as train
from threadweaver.trajectory import check_format

pytest.importorskip("openai")
pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return gym_rows(20)


@pytest.fixture(autouse=True)
def no_plot(request, monkeypatch):
    """Drawing takes most of the time of a small run."""
    if "twenty" not in request.node.name:
        monkeypatch.setattr("threadweaver.annotate.annotation.plot_summary", lambda *_: None)


@pytest.fixture
def annotate(tmp_path, student, rows):
    """Runs the command on some of the rows; returns the exit code."""

    def run(server: StubServer | None, *options: str, given: list[dict] | None = None) -> int:
        data = write_rows(rows if given is None else given, tmp_path / "data.jsonl")
        url = ["--teacher.url", server.url] if server else []
        fixed = ["--data", data, "--student", student, "--out", str(tmp_path / "out"), *url]
        return main([*fixed, "--teacher.model", "stub", "--engine.kv_gigabytes", "0.01", *options])

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kind(messages: Messages) -> str:
    """Which prompt a conversation began with."""
    text = messages[0]["content"]
    return "map" if "The reasoning:" in text else "part" if "The part:" in text else "outline"


def test_twenty_problems_go_through_all_steps_and_sft_trains_on_what_is_kept(
    annotate, tmp_path, student, rows, capsys
):
    out = tmp_path / "out"
    with StubServer() as server:
        prices = ["--teacher.input_price", "2", "--teacher.output_price", "10"]
        assert annotate(server, "--teacher.at_once", "4", *prices) == 0
    shown = capsys.readouterr().out
    assert len(server.received) == 60  # a map, a thread and a block each
    kept = read(out / "kept.jsonl")
    assert len(kept) == 20 and read(out / "rejected.jsonl") == []
    for row, given in zip(kept, rows, strict=True):
        assert row["question"] == given["question"]
        assert row["reward_model"]["ground_truth"] == given["answer"]
        assert check_format(row["response"], require_parallel=True) == []
        assert ", in the same way as" not in row["response"]
        # All lines are there, but for what was taken out.
        for line in given["response"].splitlines():
            assert (
                line.removeprefix("Second, in the same way as the first,").strip()
                in row["response"]
            )
        assert 0.2 < row["acceleration"] < 0.5 and row["blocks"] == 1
    for step in ("1-map", "2-cut", "3-independent", "4-outline"):
        assert len(list((out / step).glob("*.json"))) == 20
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kept"], summary["prompt_tokens"], summary["completion_tokens"]) == (
        20,
        6000,
        600,
    )
    assert summary["cost"] == pytest.approx((6000 * 2 + 600 * 10) / 1e6)
    assert "20 rows" in shown and "0.02 at the prices given" in shown
    assert (out / "yield.png").stat().st_size > 1000

    options = ["--optimization.max_steps", "1", "--optimization.batch_tokens", "8192"]
    options += ["--compute.precision", "fp32", "--compute.device", "cpu", "--report.trackers", "[]"]
    settings = ["--model.path", student, "--data.train", str(out / "kept.jsonl")]
    assert train(["sft", *settings, "--run_dir", str(tmp_path / "sft"), *options]) == 0


def test_the_same_command_asks_nothing_again_and_limit_can_grow(annotate, tmp_path):
    kept = tmp_path / "out" / "kept.jsonl"
    with StubServer() as server:
        assert annotate(server, "--limit", "2") == 0
        first = read(kept)
        assert len(server.received) == 6
        assert annotate(server, "--limit", "3") == 0
        assert len(server.received) == 9
        assert read(kept)[:2] == first and len(read(kept)) == 3
        whole = kept.read_bytes()
        assert annotate(None, "--teacher.url", "http://127.0.0.1:9/v1", "--limit", "3") == 0
        assert kept.read_bytes() == whole


def test_a_reply_is_on_disk_before_the_next_request_of_its_trajectory(annotate, tmp_path):
    """So that a kill loses none that was acted upon."""
    found = []

    def reply(messages: Messages) -> str | Fault:
        held = sum(
            len(json.loads(path.read_text())["exchanges"])
            for step in ("1-map", "3-independent", "4-outline")
            for path in (tmp_path / "out" / step).glob("*.json")
        )
        found.append(held)
        return right(messages)

    with StubServer(reply) as server:
        assert annotate(server, "--limit", "2", "--teacher.at_once", "1") == 0
    assert found == list(range(6))


def test_a_reply_that_breaks_a_rule_is_sent_back_with_the_breach(annotate, tmp_path):
    bad = {
        "map": ["1 [1-2] work: a", "I am sorry, but no."],
        "part": ["nothing to change", '[{"src": "not there", "dest": ""}]'],
        "outline": ["<Outlines></Outlines>", Fault(text="<Outlines>", finish="length")],
    }

    def reply(messages: Messages) -> str | Fault:
        tries = len(messages) // 2
        return bad[kind(messages)][tries] if tries < 2 else right(messages)

    with StubServer(reply) as server:
        assert annotate(server, "--limit", "1") == 0
    (last,) = [m for m in server.received if kind(m) == "map" and len(m) == 5]
    assert last[1]["content"] == bad["map"][0] and "must end at 8" in last[2]["content"]
    assert "neither a step nor a group" in last[4]["content"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["kept"] == 1
    breaches = {
        step: summary["steps"][step]["breaches"] for step in ("1-map", "3-independent", "4-outline")
    }
    assert breaches == {
        "1-map": {"rule": 1, "form": 1},
        "3-independent": {"form": 1, "rule": 1},
        "4-outline": {"rule": 1, "cut off": 1},
    }


@pytest.mark.parametrize(
    ("of", "reply", "step", "reason"),
    [
        ("map", "no", "1-map", "no map in 3 tries"),
        ("map", Fault(text="No.", refusal="No."), "1-map", "no map in 3 tries"),
        ("map", Fault(text=""), "1-map", "no map in 3 tries"),
        ("map", "1 [1-8] work: all", "1-map", "its map has no parallel group"),
        ("map", "1 [1-7] work: a\n2 [8-8] work: b\nparallel 1 | 2", "2-cut", "can be cut"),
        ("outline", "no", "4-outline", "no block got outlines"),
        ("part", '[{"src": "I take", "dest": "\\\\boxed{0}</think>"}]', None, None),
        ("part", "no", None, None),
        ("map", Fault(400, b'{"error": {"message": "too long"}}'), "1-map", "does not take the"),
        ("part", Fault(500), "3-independent", "gave no reply"),
    ],
)  # fmt: skip
def test_what_fails_is_left_out_with_its_reason_and_never_fatal_to_the_rest(
    annotate, tmp_path, of, reply, step, reason
):
    """The first trajectory gets the bad replies, the second good ones."""

    def script(messages: Messages) -> str | Fault:
        first = server.received[0][0]["content"].rpartition("The problem:")[2].splitlines()[1]
        is_bad = kind(messages) == of and first in messages[0]["content"]
        return reply if is_bad else right(messages)

    out = tmp_path / "out"
    with StubServer(script) as server:
        options = ["--limit", "2", "--teacher.at_once", "1", "--teacher.retries", "1"]
        assert annotate(server, *options) == 0
    rejected = read(out / "rejected.jsonl")
    if step is None:  # the thread stays as it was, and is counted
        assert rejected == [] and len(read(out / "kept.jsonl")) == 2
        assert ", in the same way as" in read(out / "kept.jsonl")[0]["response"]
        assert json.loads((out / "summary.json").read_text())["threads_unchanged"] == 1
        return
    (row,) = rejected
    assert row["number"] == 1 and row["step"] == step and reason in row["reason"]
    assert row["source"].endswith("data.jsonl:1") and len(read(out / "kept.jsonl")) == 1


def test_what_got_no_reply_is_asked_again_by_the_next_run(annotate, tmp_path):
    script = lambda messages: Fault(500) if len(server.received) == 1 else right(messages)  # noqa: E731
    with StubServer(script) as server:
        assert annotate(server, "--limit", "2", "--teacher.retries", "0") == 0
    assert len(read(tmp_path / "out" / "rejected.jsonl")) == 1
    with StubServer() as server:
        assert annotate(server, "--limit", "2") == 0
    assert len(read(tmp_path / "out" / "kept.jsonl")) == 2


TOO_LONG = Fault(400, b'{"error": {"message": "the prompt is too long"}}')


def test_a_teacher_that_takes_no_request_is_an_error_in_its_own_words(annotate, tmp_path, capsys):
    """Its settings may then change: no result depends on them."""
    fault = Fault(400, b'{"error": {"message": "use max_completion_tokens instead"}}')
    script = lambda messages: fault if "max_tokens" in server.requests[-1] else right(messages)  # noqa: E731
    with StubServer(script) as server:
        assert annotate(server, "--limit", "3", "--teacher.max_tokens", "900") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: teacher: takes no request: ")
        assert "use max_completion_tokens instead" in error and "teacher.extra" in error
        extra = ("--teacher.extra", "{max_completion_tokens: 900}")
        assert annotate(server, "--limit", "3", *extra) == 0
        assert len(read(tmp_path / "out" / "kept.jsonl")) == 3
        assert annotate(server, "--limit", "3") == 2
        assert "teacher.extra is {}" in capsys.readouterr().err


def test_requests_that_a_teacher_does_not_take_are_told_in_its_words_and_made_again(
    annotate, tmp_path, capsys
):
    asked: list[Messages] = []

    def script(messages: Messages) -> str | Fault:
        asked.append(messages)
        is_first = asked[0][0]["content"] == messages[0]["content"]
        return TOO_LONG if is_first else right(messages)

    with StubServer(script) as server:
        options = ("--limit", "2", "--teacher.at_once", "1")
        assert annotate(server, *options) == 0
        before = len(asked)
        shown = capsys.readouterr().out
        assert "left out: 1, the teacher does not take the request, the first: Error" in shown
        assert "the prompt is too long" in shown and "makes it again" in shown
        # That it took others stands in the folder, so that this is no error.
        assert annotate(server, *options) == 0
        assert len(asked) == before + 1 and len(read(tmp_path / "out" / "kept.jsonl")) == 1


def test_a_server_that_never_replies_ends_even_a_short_run_and_says_why(annotate, capsys):
    options = ("--limit", "2", "--teacher.retries", "0", "--teacher.url", "http://127.0.0.1:9/v1")
    assert annotate(None, *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the teacher answers no more (Connection error. ")
    assert "attempts failed" in error and "run the same command again" in error


def test_a_folder_is_refused_before_models_are_read_and_a_bad_model_leaves_none(
    annotate, tmp_path, capsys
):
    out = tmp_path / "out"
    url = ("--teacher.url", "http://127.0.0.1:9/v1")
    assert annotate(None, *url, "--student", "nowhere") == 2
    assert "nowhere: no model here" in capsys.readouterr().err and not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    assert annotate(None, *url, "--student", "nowhere") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_a_dissolved_block_stands_as_its_lines(annotate, tmp_path, rows):
    """Of two blocks the first gets no outlines."""
    body, answer = rows[0]["response"].removeprefix("<think>\n").split("</think>")
    given = {**rows[0], "response": f"<think>\n{body}{body}</think>{answer}"}
    two_groups = (
        "1 [1-1] understand: a\n2 [2-4] work: b\n3 [5-7] work: c\n4 [8-9] work: d\n"
        "5 [10-12] work: e\n6 [13-15] work: f\n7 [16-16] work: g\nparallel 2 | 3\nparallel 5 | 6"
    )

    def script(messages: Messages) -> str | Fault:
        if kind(messages) == "map":
            return two_groups
        before, _, _ = messages[0]["content"].partition("What the people then did:")
        is_first = "First," not in before
        return "no" if kind(messages) == "outline" and is_first else right(messages)

    with StubServer(script) as server:
        assert annotate(server, given=[given]) == 0
    (row,) = read(tmp_path / "out" / "kept.jsonl")
    before, _, after = row["response"].partition("<Parallel>")
    assert before == f"<think>\n{body}{body.partition('First,')[0]}"
    assert row["blocks"] == 1 and ", in the same way as" not in after


def test_answers_that_are_wrong_never_reach_the_teacher(annotate, tmp_path, rows):
    wrong = {**rows[0], "answer": "1000000"}
    no_reasoning = {**rows[1], "response": f"\\boxed{{{rows[1]['answer']}}}"}
    with StubServer() as server:
        assert annotate(server, given=[wrong, no_reasoning]) == 0
        assert server.received == []
    reasons = [(row["step"], row["reason"]) for row in read(tmp_path / "out" / "rejected.jsonl")]
    assert reasons == [
        ("0-answer", "the answer is not right"),
        ("0-answer", "has no reasoning before its answer"),
    ]


def opening(student: str, folder: Path) -> str:
    """A copy of a student whose chat template opens the thinking."""
    shutil.copytree(student, folder)
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    opens = "{% if add_generation_prompt %}<think>\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template + opens)
    return str(folder)


def test_a_thought_that_the_prompt_opened_and_nothing_closes_is_not_paid_for(
    annotate, tmp_path, rows, student
):
    """Whether the student did not end it, or the data file holds no thinking."""
    thinks = ["--student", opening(student, tmp_path / "thinks")]
    body, answer = rows[0]["response"].removeprefix("<think>\n").split("</think>")
    cut = f"{body}\n\n\\boxed{{{rows[0]['answer']}}}, but wait"
    unanswered = {k: v for k, v in rows[0].items() if k != "response"}
    bare = {**rows[1], "response": f"One.\n\nTwo.\n\n\\boxed{{{rows[1]['answer']}}}"}
    given = [unanswered, bare, rows[2]]
    out = tmp_path / "out"
    with StubServer() as server:
        assert annotate(server, *thinks, "--generation.max_tokens", "5", given=given) == 0
        assert len(server.received) == 3  # about the third
        path = out / "0-answer" / "000001.json"
        record = {**json.loads(path.read_text()), "response": cut}
        path.write_text(json.dumps(record))
        assert annotate(server, *thinks, "--generation.max_tokens", "5", given=given) == 0
        assert len(server.received) == 3
        rejected = [(r["number"], r["step"], r["reason"]) for r in read(out / "rejected.jsonl")]
        assert rejected == [
            (1, "0-answer", "the answer was cut off (generation.max_tokens)"),
            (2, "0-answer", "breaks the format"),
        ]
        assert [row["question"] for row in read(out / "kept.jsonl")] == [rows[2]["question"]]
        # It is made again with a larger limit, and one that ends is right.
        assert annotate(server, *thinks, "--generation.max_tokens", "6", given=given) == 0
        assert json.loads(path.read_text())["response"] != cut
        path.write_text(json.dumps({**record, "response": f"{body}</think>{answer}"}))
        assert annotate(server, *thinks, "--generation.max_tokens", "6", given=given) == 0
        assert len(read(out / "kept.jsonl")) == 2


def test_problems_without_a_response_are_answered_by_the_student_once(annotate, tmp_path, rows):
    given = [{k: v for k, v in row.items() if k != "response"} for row in rows[:3]]
    out = tmp_path / "out"
    with StubServer() as server:
        assert annotate(server, "--generation.max_tokens", "5", given=given) == 0
        times = {path: path.stat().st_mtime_ns for path in (out / "0-answer").iterdir()}
        assert len(times) == 3 and server.received == []
        assert annotate(server, "--generation.max_tokens", "5", given=given) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (out / "0-answer").iterdir()}


def test_wrong_answers_that_were_cut_off_are_told_and_made_again_with_a_larger_limit(
    annotate, tmp_path, rows, capsys
):
    given = [{k: v for k, v in row.items() if k != "response"} for row in rows[:3]]
    out = tmp_path / "out"
    reason = "the answer was cut off (generation.max_tokens)"

    def answers() -> list[dict[str, Any]]:
        return [json.loads((out / "0-answer" / f"00000{n}.json").read_text()) for n in (1, 2, 3)]

    with StubServer() as server:
        assert annotate(server, "--generation.max_tokens", "5", given=given) == 0
        shown = capsys.readouterr().out
        assert f"left out: 3, {reason}" in shown and "3 answers were cut off: " in shown
        assert {row["reason"] for row in read(out / "rejected.jsonl")} == {reason}
        first = answers()
        # One that is right as it stands stays, however it ended.
        right = {**first[1], "response": rows[1]["response"]}
        (out / "0-answer" / "000002.json").write_text(json.dumps(right))
        assert annotate(server, "--generation.max_tokens", "9", given=given) == 0
        second = answers()
        assert second[1] == right and len(read(out / "kept.jsonl")) == 1
        for before, after in ((first[0], second[0]), (first[2], second[2])):
            assert (before["max_tokens"], after["max_tokens"]) == (5, 9)
            assert after["response"].startswith(before["response"].rstrip("\ufffd"))
            assert len(after["response"]) > len(before["response"])
        assert annotate(server, "--generation.max_tokens", "5", given=given) == 0
        assert answers() == second
        # A folder of a version that fixed the limit goes on.
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["settings"]["generation"]["max_tokens"] = 5
        (out / "manifest.json").write_text(json.dumps(manifest))
        assert annotate(server, "--generation.max_tokens", "9", given=given) == 0


def test_answers_that_the_context_ends_are_told(annotate, tmp_path, capsys):
    given = [{"question": "x" * n, "answer": "4"} for n in (8190, 9000)]
    with StubServer() as server:
        assert annotate(server, given=given) == 0
    assert [row["reason"] for row in read(tmp_path / "out" / "rejected.jsonl")] == [
        "the answer was cut off (the model's context)",
        "the prompt leaves no room for an answer",
    ]
    shown = capsys.readouterr()
    assert "max_tokens: 2 and not 4,096 after the longest prompt" in shown.err
    assert "for an answer, the first: the prompt has 9000 tokens" in shown.out


def test_a_server_that_is_gone_ends_the_run_and_nothing_is_lost(annotate, tmp_path, capsys):
    script = lambda messages: right(messages) if len(server.received) < 4 else Fault(500)  # noqa: E731
    with StubServer(script) as server:
        options = ["--teacher.at_once", "2", "--teacher.retries", "0"]
        assert annotate(server, *options) == 1
        assert len(server.received) < 12
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the teacher answers no more") and "run the same command" in line
    asked = server.received[:3]  # those that were answered well
    with StubServer() as server:
        assert annotate(server, *options) == 0
    assert len(read(tmp_path / "out" / "kept.jsonl")) == 20
    assert not any(messages in asked for messages in server.received)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_open_requests_end_and_makes_no_other(
    annotate, tmp_path, capsys, monkeypatch, number
):
    def script(messages: Messages) -> str | Fault:
        if len(server.received) == 5:
            os.kill(os.getpid(), number)
        return right(messages)

    stopping = threading.Event()
    signalled = Run._signalled

    def and_tell(self: Run, number: int) -> None:
        signalled(self, number)
        stopping.set()

    monkeypatch.setattr(Run, "_signalled", and_tell)

    def before_reply(_: Messages) -> bool:
        return len(server.received) < 5 or stopping.wait(300)

    with StubServer(script) as server:
        server.before_reply = before_reply
        options = ["--limit", "6", "--teacher.at_once", "3"]
        assert annotate(server, *options) == 128 + number
        *_, told, last = capsys.readouterr().err.splitlines()
        assert "stopping as soon as the open requests have ended" in told
        assert "run the same command again" in last
        stopped = list(server.received)
        assert 5 <= len(stopped) <= 5 + 2  # the others that may have been open
        assert annotate(server, *options) == 0
    assert not any(messages in stopped for messages in server.received[len(stopped) :])
    assert len(read(tmp_path / "out" / "kept.jsonl")) == 6


def test_a_dry_run_prints_the_prompts_and_asks_and_makes_nothing(tmp_path, rows, capsys):
    data = write_rows(rows, tmp_path / "data.jsonl")
    assert main(["--data", data, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert rows[0]["question"].strip() in shown and "1: I am to compute" in shown
    for part in (
        "----- map, ",
        "----- independent",
        "{{forbidden}}",
        "----- outline",
        "----- again",
    ):
        assert part in shown
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--teacher.url", "localhost:80"], "teacher.url is 'localhost:80'"),
        (["--teacher.url", "http://localhost:99999/v1"], "teacher.url is 'http://localhost:99999"),
        (["--teacher.url", "http://local host/v1"], "teacher.url is 'http://local host/v1'"),
        (["--teacher.model="], "teacher.model"),
        (["--teacher.at_once", "0"], "teacher.at_once is 0"),
        (["--teacher.timeout", "0"], "teacher.timeout is 0"),
        (["--teacher.timeout", "nan"], "teacher.timeout: Expected"),
        (["--teacher.retries", "-1"], "teacher.retries is -1"),
        (["--teacher.temperature", "-1"], "teacher.temperature is -1"),
        (["--teacher.input_price", "-1"], "teacher.input_price is -1"),
        (["--teacher.extra", "{messages: []}"], "teacher.extra"),
        (["--teacher.extra", "{a: .nan}"], "teacher.extra cannot be sent as JSON"),
        (["--teacher.urll", "x"], "did you mean 'teacher.url'?"),
        (["--generation.sampling.temperature", "-1"], "temperature is -1"),
        (["--limit", "0"], "limit is 0"),
        (["--student="], "student"),
        (["--student", "no/such"], "no/such"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--prompts", "no"], "prompts: no is no folder"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_anything_is_made(
    annotate, tmp_path, capsys, options, says
):
    with StubServer() as server:
        assert annotate(server, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error, error
    assert not (tmp_path / "out").exists() and server.received == []


def test_a_teacher_in_our_engine_that_is_none_is_refused_first(annotate, tmp_path, capsys):
    assert annotate(None) == 2
    assert "stub" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_things_is_refused(annotate, tmp_path, capsys, rows):
    out = tmp_path / "out"
    with StubServer() as server:
        assert annotate(server, "--limit", "1") == 0
        for options, given, says in (
            (["--teacher.model", "other"], rows, "teacher.model is other"),
            (["--seed", "1"], rows, "seed is 1"),
            ([], rows[1:], "data is "),
        ):
            assert annotate(server, "--limit", "1", *options, given=given) == 2
            assert says in capsys.readouterr().err.splitlines()[-1]
        (out / "1-map" / "000001.json").write_text('{"exchanges": [{}]}')
        assert annotate(server, "--limit", "1") == 2
        assert "000001.json is not what annotate wrote" in capsys.readouterr().err
        (out / "manifest.json").unlink()
        assert annotate(server, "--limit", "1") == 2
        assert "is not empty" in capsys.readouterr().err


def test_a_folder_belongs_to_one_process_at_a_time(annotate, tmp_path):
    refusals = []

    def script(messages: Messages) -> str | Fault:
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on ") as caught:
            Store(tmp_path / "out", {})
        refusals.append(caught)
        return right(messages)

    with StubServer(script) as server:
        assert annotate(server, "--limit", "1") == 0
    assert len(refusals) == 3
