"""Agreement with what the published implementation recorded (golden cases, README beside them)."""

import json
from pathlib import Path

import pytest

from threadweaver.trajectory import Codec, check_format, extract_calls, path_lengths

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
# Ids 50.. are outline numbers, 60 is a newline; all other ids of these cases are in no vocabulary.
CODEC = Codec.from_vocab(
    {**GOLDEN["tags"], "\n": 60, **{str(n): 49 + n for n in range(1, 10)}}, eos_id=120
)
ROLLOUT_CODEC = Codec.from_vocab(GOLDEN["rollout_vocab"], eos_id=120)


def cases(key):
    return pytest.mark.parametrize("case", GOLDEN[key], ids=range(len(GOLDEN[key])))


def maximal(paths) -> set[tuple[int, ...]]:
    paths = {tuple(p) for p in paths}
    return {p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)}


@cases("paths")
def test_calls_unroll_to_the_golden_paths(case):
    paths = [call.context + call.completion for call in extract_calls(case["ids"], CODEC)]
    assert maximal(paths) == maximal(case["paths"])
    assert {tuple(p) for p in case["paths"]} <= {tuple(p) for p in paths}


@cases("stats")
def test_path_lengths_are_golden(case):
    lengths = path_lengths(case["ids"], CODEC)
    assert lengths.total_tokens == case["total_tokens"]
    assert lengths.longest_path_tokens == case["longest_path_tokens"]
    assert lengths.blocks == case["blocks"]
    assert lengths.acceleration == pytest.approx(case["acceleration"], abs=1e-12)
    assert lengths.mean_threads_per_block == pytest.approx(case["mean_threads_per_block"])


@cases("format")
def test_format_check_is_golden(case):
    problems = check_format(case["text"], require_parallel=True)
    assert (problems == []) == case["valid"]
    problems = check_format(case["text"], allow_space_between_threads=True, require_parallel=True)
    assert (problems == []) == case["valid_if_whitespace_between_threads_is_allowed"]


# A thread that ended by EOS lost it: the finished text does not say which tags were forced.
COMPLETE = [case for case in GOLDEN["rollout"] if case["kind"] != "thread_eos"]


@pytest.mark.parametrize("case", COMPLETE, ids=[case["kind"] for case in COMPLETE])
def test_calls_of_a_finished_rollout_are_those_made(case):
    ids = case["prompt"] + case["response"]
    calls = extract_calls(ids, ROLLOUT_CODEC, len(case["prompt"]))
    assert [(call.context, call.completion) for call in calls] == [
        (call["prompt"], call["completion"]) for call in case["calls"]
    ]
