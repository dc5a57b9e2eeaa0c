"""P-GRPO as a run: it learns what is rewarded, skips what has no signal, and resumes."""

from __future__ import annotations

import json
import math
import re
from unittest.mock import MagicMock

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from threadweaver.evaluate.grade import METRICS
from threadweaver.generate.runner import Runner
from threadweaver.model import WeightCopies, build_tokenizer, trie_logprobs
from threadweaver.tasks import Problem
from threadweaver.train.policy_loss import policy_loss
from threadweaver.train.rl import RLTrainer
from tw_kernels import Trie

from .conftest import Run

PROMPTS = [f"{i}?\n" for i in range(5)]


class LetterTask:
    """A stand-in for a task: what is right is a function of the response."""

    ungraded = 0

    def __init__(self, is_correct):
        self._is_correct = is_correct

    def problems(self, split, n, seed=0):
        return [Problem(prompt, "", f"prompt {i}") for i, prompt in enumerate(PROMPTS)]

    def is_correct(self, response: str, problem: Problem) -> bool:
        return self._is_correct(response)


def begins_low(response: str) -> bool:
    """About every other response of a model that knows nothing."""
    return bool(response) and ord(response[0]) < 64


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    def make(is_correct=begins_low, name: str = "run") -> Run:
        monkeypatch.setattr(
            "threadweaver.train.rl.load_task", lambda *_, **__: LetterTask(is_correct)
        )
        return Run(
            "rl",
            tmp_path / name,
            rollouts={
                "problems": 3,
                "samples": 4,
                "generation": {"max_tokens": 6},
                "engine": {"kv_gigabytes": 0.01},
            },
            optimization={"steps": 8, "batch_tokens": 256, "learning_rate": 3e-3},
            report={"checkpoint_every": 3},
        )

    return make


def test_what_is_rewarded_becomes_frequent(new_run):
    run = new_run()
    run.settings["optimization"] |= {"steps": 50, "learning_rate": 1e-2}
    run.settings["rollouts"] |= {"problems": 5, "samples": 8}
    assert run() == 0
    rewards = [record["reward_correct"] for record in run.metrics()]
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.75


def test_a_step_says_how_far_its_rollouts_and_its_update_are(new_run, capsys, ticking_clock):
    run = new_run()
    run.settings["optimization"] |= {"steps": 1, "updates": 2, "batch_tokens": 16}
    assert run() == 0
    shown = capsys.readouterr().out
    assert re.search(r"^rolling out, step 1: \d+/12 responses, [\d,]+ tokens/s", shown, re.M)
    assert re.search(r"^rolling out, step 1: 12/12 responses, .*12 graded, in \d+ s$", shown, re.M)
    assert re.search(r"^updating, step 1: \d+/\d+ passes, \d+ s left$", shown, re.M)
    assert re.search(r"^updating, step 1: (\d+)/\1 passes, in \d+ s$", shown, re.M)


def test_the_trainer_and_the_generator_agree_on_what_was_sampled(new_run):
    run = new_run()
    assert run() == 0
    for record in run.metrics():
        assert record["max_mismatch"] <= 1e-4 and record["mismatch"] <= 1e-5
    assert any(record["mismatch"] > 0 for record in run.metrics())


def test_groups_without_signal_are_skipped_and_counted(new_run):
    run = new_run(lambda response: True)
    run.settings["reward"] = {"accel": "none"}
    assert run() == 0
    for record in run.metrics():
        assert (record["no_signal_groups"], record["updates"], record["loss"]) == (3, 0, 0)
    assert run.summary()["no_signal_groups"] == 24


def test_a_batch_without_signal_makes_no_copies_of_weights(new_run, monkeypatch):
    """They are dropped by the updates alone: they would lie there while the next batch decodes."""
    casts = []
    monkeypatch.setattr(WeightCopies, "cast", casts.append)
    run = new_run(lambda response: True)
    run.settings["reward"] = {"accel": "none"}
    run.settings["optimization"] |= {"updates": 2, "steps": 2}
    assert run() == 0
    assert not casts


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("what", ["train_step", "_save", "finish"])
def test_a_run_that_died_before_something_does_it_when_resumed(new_run, monkeypatch, what, updates):
    whole, dead = new_run(name="whole"), new_run(name="dead")
    for run in (whole, dead):
        run.settings["optimization"]["updates"] = updates
    assert whole() == 0
    step = getattr(RLTrainer, what)
    calls = 0

    def die_in_its_fifth(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == (5 if what == "train_step" else 1):
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, what, die_in_its_fifth)
        assert dead() == 130
    assert dead("--resume") == 0
    assert dead.metrics() == whole.metrics()
    assert dead.weights() == whole.weights()


def test_each_pass_takes_every_problem_once_in_an_order_of_its_own(new_run):
    run = new_run()
    seen = []

    def watch(self, problems, *rest, roll_out=RLTrainer._roll_out):
        seen.extend(problem.prompt for problem in problems)
        return roll_out(self, problems, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RLTrainer, "_roll_out", watch)
        run.settings["optimization"]["steps"] = 5
        assert run() == 0
    passes = [seen[i : i + 5] for i in range(0, 15, 5)]
    assert [sorted(p) for p in passes] == [sorted(PROMPTS)] * 3
    assert passes[0] != passes[1]


def test_several_updates_clip_the_ratio_and_report_it(new_run):
    run = new_run()
    run.settings["optimization"] |= {"updates": 3, "learning_rate": 3e-2}
    assert run() == 0
    assert any(record["clip_share"] > 0 for record in run.metrics())


def test_a_reward_that_is_no_number_is_refused_with_the_problem_named(new_run, capsys):
    run = new_run(lambda response: math.nan)
    assert run() == 2
    assert "prompt 0: the correctness of a response is nan" in capsys.readouterr().err


def test_kl_needs_a_reference_on_disk(new_run, capsys):
    run = new_run()
    run.settings["policy"] = {"kl": 0.1}
    assert run() == 2
    assert "policy.kl: the reference is the model at model.path" in capsys.readouterr().err


def test_kl_to_the_model_it_started_from(new_run):
    first, second = new_run(name="first"), new_run(name="second")
    assert first() == 0
    second.settings |= {"model": {"path": first.summary()["checkpoint"]}, "policy": {"kl": 0.1}}
    assert second() == 0
    records = second.metrics()
    assert all(record.keys() >= METRICS.keys() >= {"redundancy"} for record in records)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-7) and records[-1]["kl"] > 0


def test_no_pass_has_arguments_that_fsdp_would_move_to_a_gpu(new_run, gpus_of_fsdp):
    first, second = new_run(name="first"), new_run(name="second")
    assert first("--optimization.steps", "1") == 0
    second.settings["model"] = {"path": first.summary()["checkpoint"]}
    second.settings["policy"] = {"kl": 0.1, "entropy": 0.1}
    assert second("--optimization.steps", "1", "--optimization.updates", "2") == 0


def test_no_module_is_in_training_mode_while_log_probabilities_are_computed(new_run, monkeypatch):
    """Dropout, layer drop and router noise all ask for it."""
    run, seen = new_run(), []
    run.settings["optimization"] |= {"steps": 1, "updates": 2}

    def watch(model, *arguments):
        seen.extend(module.training for module in model.modules())
        return trie_logprobs(model, *arguments)

    monkeypatch.setattr("threadweaver.train.policy_update.trie_logprobs", watch)
    assert run() == 0
    assert seen and not any(seen)


def test_gradient_checkpointing_changes_memory_and_not_the_run(new_run, monkeypatch):
    plain, recomputed = new_run(name="plain"), new_run(name="recomputed")
    calls = []
    forward = Qwen3DecoderLayer.forward

    def count(self, *arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", count)
    assert plain() == 0
    once = sum(calls)
    calls.clear()
    assert recomputed("--compute.gradient_checkpointing", "true") == 0
    assert sum(calls) == 2 * once > 0
    for a, b in zip(plain.metrics(), recomputed.metrics(), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("pass_tokens", [None, 12])
def test_a_batch_that_is_not_finite_says_which_problems_each_micro_batch_is_of(
    new_run, monkeypatch, capsys, pass_tokens
):
    def spoilt(*arguments):
        found = policy_loss(*arguments)
        return found._replace(loss=found.loss * math.nan)

    monkeypatch.setattr("threadweaver.train.policy_update.policy_loss", spoilt)
    run = new_run()
    run.settings["optimization"]["batch_tokens"] = 20
    run.settings["compute"]["pass_tokens"] = pass_tokens
    assert run() == 1
    assert "step-1: loss nan" in capsys.readouterr().err
    folder = run.folder / "nan-step-1"
    micro_batches = json.loads((folder / "batch.json").read_text())["micro_batches"]
    tries = [Trie(**fields) for fields in torch.load(folder / "tries.pt")]
    assert len(micro_batches) == len(tries) > 1
    tokenizer = build_tokenizer()
    for micro, trie in zip(micro_batches, tries, strict=True):
        # The first token of a prompt is its number.
        numbers = map(tokenizer.decode, trie.tokens[trie.parents < 0].tolist())
        assert sorted(micro["examples"]) == sorted({f"prompt {number}" for number in numbers})


def test_logits_that_are_not_finite_end_the_run_with_the_request_named(
    new_run, monkeypatch, capsys
):
    logits = Runner._logits
    monkeypatch.setattr(Runner, "_logits", lambda self, inputs: logits(self, inputs) * math.nan)
    assert new_run()() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: generation 0, request (0,)") and error.count("\n") == 1


def without_validation(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if "validation" not in k} for r in records]


def validations(run: Run) -> dict[int, dict]:
    """By step."""
    found = {
        r["step"]: {k: v for k, v in r.items() if k.startswith("validation_")}
        for r in run.metrics()
    }
    return {step: figures for step, figures in found.items() if figures}


def validated(run: Run) -> Run:
    run.settings["report"]["validate_every"] = 3
    run.settings["evaluate"] = {
        "problems": 5,
        "generation": {"max_tokens": 6},
        "engine": {"kv_gigabytes": 0.01},
    }
    return run


def test_validation_comes_every_so_many_steps_and_at_the_end_and_changes_nothing(new_run, capsys):
    plain, watched = new_run(name="plain"), validated(new_run(name="watched"))
    assert plain() == watched() == 0
    assert watched.weights() == plain.weights()
    assert without_validation(watched.metrics()) == plain.metrics()
    found = validations(watched)
    assert list(found) == [3, 6, 8] and not validations(plain)
    for figures in found.values():
        assert figures["validation_problems"] == 5
        for mode in ("parallel", "sequential"):
            assert 0 <= figures[f"validation_{mode}_accuracy"] <= 1
            assert figures[f"validation_{mode}_total_tokens"] > 0
            assert figures[f"validation_{mode}_ungraded"] == 0
            wrong = 1 - figures[f"validation_{mode}_accuracy"]  # and none of them boxes anything
            assert figures[f"validation_{mode}_no_answer"] == round(5 * wrong) > 0
    assert (
        watched.summary()["validation_parallel_accuracy"]
        == (found[8]["validation_parallel_accuracy"])
    )
    assert " mode" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("step 3/8: ")
    )


def test_validation_and_rollouts_take_their_kv_pages_in_turn(new_run, monkeypatch):
    run = validated(new_run())
    launch, update = Runner.launch, RLTrainer.update
    runners, held = [], []

    def watch_launch(self, step):
        if self not in runners:
            runners.append(self)
        launch(self, step)
        held.append([runner._pages is not None for runner in runners].count(True))

    def watch_update(self, *arguments):
        assert all(runner._pages is None for runner in runners)
        return update(self, *arguments)

    monkeypatch.setattr(Runner, "launch", watch_launch)
    monkeypatch.setattr(RLTrainer, "update", watch_update)
    assert run() == 0
    assert len(runners) == 2 and set(held) == {1}


def test_validation_asks_the_same_problems_with_the_same_draws_each_time(new_run):
    run = validated(new_run())
    run.settings["optimization"] |= {"learning_rate": 1e-30, "steps": 6}
    assert run() == 0
    first, second = validations(run).values()
    assert first == second


def test_a_resumed_run_validates_as_one_that_was_not_stopped(new_run, monkeypatch):
    whole, dead = validated(new_run(name="whole")), validated(new_run(name="dead"))
    assert whole() == 0
    validate, calls = RLTrainer._validate, []

    def die_in_the_second(self):
        calls.append(self.steps_done)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "_validate", die_in_the_second)
        assert dead() == 130
    assert dead("--resume") == 0
    assert validations(dead) == validations(whole) and dead.weights() == whole.weights()


def test_problems_that_lie_elsewhere_are_taken_and_others_refused(new_run, monkeypatch, capsys):
    whole, dead = new_run(name="whole"), new_run(name="dead")
    assert whole() == 0
    dead.settings["task"] = {"name": "/old/problems.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "finish", MagicMock(side_effect=KeyboardInterrupt))
        assert dead() == 130
    capsys.readouterr()
    dead.settings["task"] = {"name": "/new/problems.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr("tests.train.test_rl.PROMPTS", ["other?\n", *PROMPTS[1:]])
        assert dead("--resume") == 2
    error = capsys.readouterr().err
    assert "task: /new/problems.jsonl is not what" in error and "was trained on" in error
    assert dead("--resume") == 0
    assert dead.weights() == whole.weights()


def test_held_out_problems_that_do_not_exist_are_named_before_the_first_step(
    new_run, monkeypatch, capsys
):
    def problems(self, split, n, seed=0):
        if split == "validation":
            raise ValueError("the file: 0 problems for validation")
        return [Problem("a?\n", "", "row")]

    run = validated(new_run())
    monkeypatch.setattr(LetterTask, "problems", problems)
    assert run() == 2
    assert "evaluate: the file: 0 problems for validation" in capsys.readouterr().err
    assert not run.folder.exists()


def only_some_prompts(response: str, problem: Problem) -> bool:
    return problem.prompt in PROMPTS[:2] and begins_low(response)


def test_refill_replaces_groups_without_a_signal_by_those_of_further_problems(new_run, monkeypatch):
    run = new_run()
    run.settings["reward"] = {"accel": "none"}
    run.settings["rollouts"] |= {"refill": True, "samples": 8}
    monkeypatch.setattr(LetterTask, "is_correct", lambda self, *a: only_some_prompts(*a))
    assert run() == 0
    records = run.metrics()
    for record in records:
        with_signal = record["groups"] - record["no_signal_groups"]
        trained = with_signal - record["unused_groups"]
        assert 3 <= record["groups"] <= 9
        assert trained == 3 or (trained < 3 and record["groups"] == 9)
    assert any(record["groups"] > 3 and record["updates"] for record in records)
    assert run.summary()["groups"] == sum(record["groups"] for record in records)


def test_refill_goes_through_the_problems_in_order_also_when_resumed(new_run, monkeypatch):
    whole, dead = new_run(name="whole"), new_run(name="dead")
    monkeypatch.setattr(LetterTask, "is_correct", lambda self, *a: only_some_prompts(*a))
    for run in (whole, dead):
        run.settings["rollouts"]["refill"] = True
        run.settings["reward"] = {"accel": "none"}
    seen = []
    roll_out = RLTrainer._roll_out

    def watch(self, problems, *rest):
        seen.extend(problem.prompt for problem in problems)
        return roll_out(self, problems, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "_roll_out", watch)
        assert whole() == 0
    passes = [seen[i : i + 5] for i in range(0, len(seen) - 4, 5)]
    assert len(passes) > 5 and all(sorted(p) == sorted(PROMPTS) for p in passes)
    dead.dies_in_step(5, RLTrainer, monkeypatch)
    assert dead("--resume") == 0
    assert dead.metrics() == whole.metrics() and dead.weights() == whole.weights()


def long_prompts(*long: int):
    def problems(self, split, n, seed=0):
        return [
            Problem("x" * 60 if i in long else prompt, "", f"prompt {i}")
            for i, prompt in enumerate(PROMPTS)
        ]

    return problems


@pytest.mark.parametrize("limit", ["context", "budget"])
def test_prompts_that_do_not_fit_are_skipped_and_counted_before_the_first_step(
    new_run, monkeypatch, capsys, limit
):
    run = new_run()
    run.settings["optimization"]["steps"] = 3
    if limit == "context":
        arch = {**run.settings["model"]["arch"], "max_position_embeddings": 50}
        run.settings["model"] = {"arch": arch}
    else:
        run.settings["optimization"]["batch_tokens"] = 50
    monkeypatch.setattr(LetterTask, "problems", long_prompts(1, 3))
    seen = set()
    roll_out = RLTrainer._roll_out

    def watch(self, problems, *rest):
        seen.update(problem.source for problem in problems)
        return roll_out(self, problems, *rest)

    monkeypatch.setattr(RLTrainer, "_roll_out", watch)
    assert run() == 0
    shown = capsys.readouterr().out
    assert "training problems: 2 of 5 prompts are skipped: prompt 1: the prompt has 60" in shown
    assert shown.index("are skipped") < shown.index("step 3/3")
    assert run.summary()["skipped_prompts"] == 2
    assert seen == {"prompt 0", "prompt 2", "prompt 4"}


def test_a_run_without_a_prompt_that_fits_is_refused(new_run, monkeypatch, capsys):
    run = new_run()
    run.settings["optimization"]["batch_tokens"] = 50
    monkeypatch.setattr(LetterTask, "problems", long_prompts(*range(5)))
    assert run() == 2
    error = capsys.readouterr().err
    assert "none of 5 prompts leaves room for a response: prompt 0: " in error
    assert error.count("\n") == 1 and not run.folder.exists()
