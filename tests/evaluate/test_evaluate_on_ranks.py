"""`torchrun -m threadweaver.eval`: the figures and files of one process, whatever the ranks."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from tests.evaluate.conftest import KNOWN, asking
from tests.evaluate.test_resume_evaluation import figures, responses
from tests.products import PROMPTS
from tests.train.on_ranks import Ended, fails_alike, on_ranks
from threadweaver import progress
from threadweaver.evaluate import metrics
from threadweaver.evaluate.__main__ import main
from threadweaver.evaluate.record import Record
from threadweaver.generate.engine import Engine, NonFiniteLogits

HOT = ["--mode", "both", "--samples", "3", "--temperature", "2", "--max_tokens", "30"]
HOT += ["--max_sequences", "3"]


@pytest.fixture
def arguments(folder, tmp_path):
    """Of an evaluation on five products, the two that the model knows among them."""
    pytest.importorskip("math_verify")
    unknown = [(PROMPTS[0] + "?" * i, 1) for i in range(1, 4)]
    return asking([*KNOWN, *unknown], folder, tmp_path)


def solve(arguments: list[str], folder: Path, count: int, **more) -> Ended:
    return on_ranks(arguments, folder, count, command="threadweaver.evaluate", **more)


def interrupted(rank: int) -> None:
    """The first rank is interrupted when it has a problem behind it, and has kept responses that
    the others began with."""
    no_lines(rank)
    if rank > 0:
        return
    collect, count = Record.collect, itertools.count()
    metrics.COLLECT_SECONDS = 0.0  # after each step

    def collect_and_stop(self: Record, elapsed: float) -> None:
        collect(self, elapsed)
        if next(count) < 32:  # a response has 30 tokens
            return
        assert self._log is not None
        while not {1, 2} <= {key[1] for key in self._log.rows}:
            time.sleep(0.01)
            collect(self, elapsed)
        raise KeyboardInterrupt

    Record.collect = collect_and_stop


def no_lines(rank: int) -> None:
    """None of progress, however long it takes."""
    progress.LINE_SECONDS = 1e9


def not_finite(rank: int) -> None:
    """The second rank fails in its sixth step."""
    no_lines(rank)
    step, count = Engine.step, itertools.count()

    def failing(self):
        if next(count) == 5:
            raise NonFiniteLogits("generation 0, request (0,): not finite")
        return step(self)

    if rank == 1:
        Engine.step = failing


def test_an_evaluation_comes_out_as_in_one_process_also_resumed_on_other_ranks(arguments, tmp_path):
    assert main(arguments(*HOT)) == 0
    whole = figures(tmp_path), responses(tmp_path)
    for name in ("e.json", "r.jsonl"):
        (tmp_path / name).unlink()
    error = solve(arguments(*HOT), tmp_path, 3, before=interrupted).one_line(130)
    kept = (tmp_path / "r.jsonl.partial").read_text().splitlines()[1:]
    assert f"{len(kept)} responses are kept: give the same command to go on" in error
    asked = {json.loads(line)["key"][1] for line in kept}
    assert {1, 2} <= asked and len(kept) < 30  # which the other ranks began with
    ended = solve(arguments(*HOT), tmp_path, 2)
    assert ended.codes == [0, 0] and ended.out.count("responses are there already") == 1
    assert (figures(tmp_path), responses(tmp_path)) == whole
    record = json.loads((tmp_path / "e.json").read_text())
    assert sum(record[mode]["resumed"] for mode in ("sequential", "parallel")) == len(kept)
    assert not (tmp_path / "r.jsonl.partial").exists()


def test_fewer_problems_than_ranks_leave_ranks_without_one(arguments, tmp_path):
    assert main(arguments("--n", "2")) == 0
    alone = figures_of(tmp_path), responses(tmp_path)
    ended = solve(arguments("--n", "2", "--overwrite"), tmp_path, 3)
    assert ended.codes == [0, 0, 0], ended.err
    assert (figures_of(tmp_path), responses(tmp_path)) == alone


def figures_of(path: Path) -> dict:
    record = json.loads((path / "e.json").read_text())
    return {name: record["parallel"][name] for name in ("accuracy", "total_tokens", "decode_steps")}


def test_prompts_none_of_which_fits_are_refused_in_one_line(arguments, tmp_path):
    question = {"question": "1" * 2000, "ground_truth": "1"}
    (tmp_path / "products.jsonl").write_text(json.dumps(question) + "\n")
    line = solve(arguments(), tmp_path, 2, before=fails_alike).one_line(2)
    assert line.startswith("error: none of 1 prompts leaves room for a response")


def test_a_rank_that_fails_while_others_decode_is_named_and_ends_all(arguments, tmp_path):
    line = solve(arguments(*HOT), tmp_path, 2, before=not_finite).one_line(1)
    assert line.startswith("error: rank 1: generation 0, request (0,): not finite")


def test_ranks_with_other_settings_are_refused(arguments, tmp_path):
    each = [arguments("--samples", "2"), arguments("--samples", "3")]
    line = solve(each, tmp_path, 2, before=fails_alike).one_line(2)
    assert "rank 1 has samples 3, not 2 as rank 0: start all ranks alike" in line
