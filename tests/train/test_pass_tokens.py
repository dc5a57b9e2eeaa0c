"""compute.pass_tokens in runs: the same training in smaller passes, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from tests.train.conftest import save_products
from tests.train.easy_task import PARALLEL
from tests.train.test_rl import new_run as new_rl_run
from tests.train.test_sft import trainer_of
from threadweaver.data import save_rows, trajectory_row
from threadweaver.train.batches import Step
from threadweaver.train.sft import SFTTrainer

__all__ = ["new_rl_run"]  # a fixture


LONGEST_PATH, LARGEST_TRIE = 255, 339  # of these files


@pytest.fixture(scope="module")
def data_files(tmp_path_factory) -> tuple[Path, Path]:
    """As in the other tests of runs, of numbers large enough for threads beside each other."""
    folder = tmp_path_factory.mktemp("two-digits")
    return save_products(folder, train=10, validation=3, digits=2)


@pytest.fixture
def passes_seen(monkeypatch) -> list[int]:
    """Tokens of every pass of a model over a trie."""
    seen: list[int] = []
    forward = Qwen3Model.forward

    def watch(self, *arguments, **options):
        if "trie_layout" in options:
            seen.append(options["input_ids"].numel())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Qwen3Model, "forward", watch)
    return seen


def test_sft_in_passes_has_the_losses_and_gradients_of_whole_tries(
    new_run, passes_seen, monkeypatch
):
    whole = trainer_of(new_run("whole"))
    most, sizes = LONGEST_PATH, whole.data.sizes
    assert max(sizes) == LARGEST_TRIE
    micro_batches = [[sizes.index(LARGEST_TRIE), sizes.index(min(sizes))], [0, 1]]
    parts = trainer_of(new_run("parts"), "--compute.pass_tokens", str(most))
    records, gradients = [], []
    for trainer in (whole, parts):
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
        passes_seen.clear()
        records.append(trainer.train_on(Step(0, micro_batches, False)))
        gradients.append([p.grad for p in trainer.model.parameters()])
    a, b = records
    assert max(passes_seen) <= most and len(passes_seen) > 2
    assert b["passes"] == len(passes_seen) and b["largest_pass_tokens"] == max(passes_seen)
    assert b["repeated_tokens"] == sum(passes_seen) - b["trie_tokens"] > 0
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name in ("supervised_tokens", "trie_tokens", "unrolled_tokens"):
        assert a[name] == b[name]
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert whole.validation and parts.validation
    loss = whole._validation_loss(whole.validation)
    passes_seen.clear()
    assert parts._validation_loss(parts.validation) == pytest.approx(loss, rel=1e-5)
    assert max(passes_seen) <= most


def test_a_run_of_sft_says_what_its_passes_cost(new_run, capsys, ticking_clock, fails):
    run, plain = new_run(), new_run("plain")
    run.settings["optimization"]["accumulation"] = 9
    assert run("--compute.pass_tokens", "20", "--optimization.max_steps", "4") == 0
    records, summary = run.metrics(), run.summary()
    largest = max(record["largest_pass_tokens"] for record in records)
    assert summary["largest_pass_tokens"] == largest == LONGEST_PATH
    repeated = sum(record["repeated_tokens"] for record in records)
    cost = summary["computed_per_trie_token"]
    assert cost == pytest.approx(1 + repeated / summary["trie_tokens"]) and cost > 1
    output = capsys.readouterr().out
    longest = re.search(r"train.jsonl: paths of .*compute.pass_tokens \(20\).* to (\d+) t", output)
    assert longest and int(longest[1]) == LONGEST_PATH
    assert re.search(rf"computed / trie tokens\W+{cost:.2f}", output)
    assert re.search(r"training, step 1: \d+/\d+ passes", output)
    assert plain() == 0
    assert not any(re.search("pass|repeated", name) for r in plain.metrics() for name in r)
    assert "computed_per_trie_token" not in plain.summary()
    assert "compute.pass_tokens is 0" in fails(new_run("bad")("--compute.pass_tokens", "0"), 2)


def test_a_resumed_run_may_take_passes_of_another_size(new_run, monkeypatch):
    whole, run = new_run("whole"), new_run()
    assert whole() == 0
    run.dies_in_step(5, SFTTrainer, monkeypatch)
    assert run("--resume", "--compute.pass_tokens", "300") == 0
    for a, b in zip(whole.metrics(), run.metrics(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    repeated = [record.get("repeated_tokens") for record in run.metrics()]
    assert repeated[:4] == [None] * 4 and sum(repeated[4:]) > 0
    share = sum(repeated[4:]) / run.summary()["trie_tokens"]
    assert run.summary()["computed_per_trie_token"] == pytest.approx(1 + share)


def test_p_grpo_in_passes_takes_the_steps_of_whole_tries(new_rl_run, passes_seen):
    """With old and reference log-probabilities, of the same rollouts."""
    first, whole, parts = (new_rl_run(name=name) for name in ("first", "whole", "parts"))
    first.settings["optimization"]["steps"] = 1
    assert first() == 0
    for run in (whole, parts):
        run.settings |= {"model": {"path": first.summary()["checkpoint"]}, "policy": {"kl": 0.1}}
        run.settings["optimization"] |= {"steps": 1, "updates": 2}
    assert whole() == 0
    assert parts("--compute.pass_tokens", "14") == 0
    [a], [b] = whole.metrics(), parts.metrics()
    passes_seen[:] = passes_seen[-3 * b["passes"] :]  # models are also tried when they are loaded
    assert b["passes"] > 4
    assert max(passes_seen) == b["largest_pass_tokens"] <= 14
    assert sum(passes_seen) == 3 * (b["trie_tokens"] + b["repeated_tokens"])
    assert b["repeated_tokens"] > 0
    assert {name: b[name] for name in a} == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert parts.summary()["computed_per_trie_token"] == pytest.approx(
        1 + b["repeated_tokens"] / b["trie_tokens"]
    )


def test_a_rank_without_a_pass_waits_with_one_that_is_split_as_all_are(
    new_run, tmp_path, monkeypatch
):
    run = new_run()
    save_rows([trajectory_row("1?\n", PARALLEL, "7")], tmp_path / "parallel.jsonl")
    run.settings["data"] = {"train": str(tmp_path / "parallel.jsonl")}
    trainer = trainer_of(run, "--compute.pass_tokens", "1")
    [trie] = trainer.data.tries
    passes = trainer._passes(trie)
    assert len(passes) > 1
    monkeypatch.setattr("threadweaver.train.sft.ranks.size", lambda: len(passes) + 1)
    monkeypatch.setattr("threadweaver.train.sft.ranks.rank", lambda: len(passes))
    dealt = trainer._dealt(passes)
    assert not dealt.mine and [len(filler) for filler in dealt.fillers] == [len(passes[0])]
