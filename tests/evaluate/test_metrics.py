"""`evaluate` on the engine: every figure from responses that are known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.products import CODEC, FACTORS, PROMPTS, RESPONSES, product_model
from tests.trajectory.test_prompt import tokenizer_of
from threadweaver.evaluate.grade import grade, graded_row, submit
from threadweaver.evaluate.metrics import Evaluation, compare, evaluate
from threadweaver.generate import Engine, GenerationSettings, LimitCounts, Rollout
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.weaver import Mode
from threadweaver.tasks import Problem, Task
from threadweaver.tasks.data_file import DataFile
from threadweaver.tasks.multiplication import Multiplication
from threadweaver.trajectory import Codec, TemplateConfig

TASK = Multiplication()
PROBLEMS = [
    Problem(prompt, str(a * b), f"f:{line}")
    for line, (prompt, (a, b)) in enumerate(zip(PROMPTS, FACTORS, strict=True), 1)
]
GREEDY = SamplingParams(temperature=0)


def solve(
    mode: Mode, problems: list[Problem] = PROBLEMS, samples: int = 1, **options
) -> Evaluation:
    settings = GenerationSettings(
        **{"mode": mode, "max_tokens": 300, "sampling": GREEDY, **options}
    )
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01)
    return evaluate(engine, TASK, problems, settings, samples=samples)


def recorded(
    texts: Iterable[str], mode: Mode = "parallel", samples: int = 1, steps: int = 7
) -> Evaluation:
    """As if these had been decoded, `samples` to each of so many copies of the first problem."""
    settings, graded = GenerationSettings(mode), []
    for text in texts:
        ids = [*CODEC.encode(text), CODEC.eos_id]
        rollout = Rollout(CODEC.encode(PROMPTS[0]), ids, [], LimitCounts(response=1), steps)
        submitted = submit(PROBLEMS[0], ids, TASK, CODEC)
        graded.append(grade(PROBLEMS[0], rollout, submitted, CODEC, settings))
    return Evaluation(settings, samples, graded, 0, seconds=2.0)


def test_a_wrong_response_without_a_box_has_no_answer():
    texts = ["4", "\\boxed{4}", "<think>\\boxed{4}", "</think>\\boxed{}", "</think>\\boxed"]
    evaluation = recorded(texts)
    assert [g.no_answer for g in evaluation.graded] == [True, False, True, True, True]
    assert evaluation.as_dict()["no_answer"] == 4


@pytest.mark.parametrize("in_background", [False, True])
def test_a_thought_that_the_prompt_opened_and_nothing_closes_has_no_answer(in_background, tmp_path):
    """DeepSeek-R1, QwQ: the generation prompt ends with <think>, and the response never says so."""
    tokenizer = tokenizer_of("thinking")
    thinks, does_not = (
        Codec.from_tokenizer(tokenizer, template=TemplateConfig(kwargs={"thinking": thinking}))
        for thinking in (True, False)
    )
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "6·7?", "answer": "42"}) + "\n")
    in_file = DataFile(str(tmp_path / "p.jsonl"), held_out=1, whole_numbers=True)
    task: Task = in_file if in_background else TASK
    problem, settings = Problem("6·7?", "42", "f:1"), GenerationSettings("sequential")
    for codec, text, is_right in (
        (thinks, "First guess \\boxed{42}. But wait", False),
        (thinks, "So it is.</think>\\boxed{42}", True),
        (does_not, "First guess \\boxed{42}. But wait", True),
    ):
        ids = codec.encode(text)
        submitted = submit(problem, ids, task, codec)
        rollout = Rollout(codec.encode_prompt(problem.prompt), ids, [], LimitCounts(response=1), 1)
        graded = grade(problem, rollout, submitted, codec, settings)
        assert (graded.correct, graded.no_answer) == (is_right, not is_right)
        assert graded.response == text and bool(graded.violations) == (not is_right)


class InTheBackground:
    """A task that notes what is submitted and which verdicts are asked for."""

    def __init__(self):
        self.events: list[str] = []
        self.ungraded = 0

    def problems(self, split, n, seed=0):
        return PROBLEMS

    def is_correct(self, response, problem):
        raise AssertionError("graded in the foreground")

    def submit(self, response, problem):
        self.events.append(f"submit {problem.answer}")
        return lambda: bool(self.events.append(f"verdict {problem.answer}")) or True

    def demonstration(self, problem, parallel):
        return None


def test_responses_are_submitted_while_others_are_decoded_and_graded_in_order():
    task = InTheBackground()
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01, max_sequences=1)
    settings = GenerationSettings("sequential", max_tokens=300, sampling=GREEDY)

    def on_progress(done: int) -> None:
        assert sum(event.startswith("submit") for event in task.events) == done

    evaluation = evaluate(engine, task, PROBLEMS, settings, on_progress=on_progress)
    answers = [problem.answer for problem in PROBLEMS]
    assert sorted(task.events[: len(answers)]) == sorted(f"submit {a}" for a in answers)
    assert task.events[len(answers) :] == [f"verdict {a}" for a in answers]
    assert [g.response for g in evaluation.graded] == RESPONSES


def test_known_problems_are_solved_in_both_modes():
    for mode in ("parallel", "sequential"):
        result = solve(mode)
        assert [g.response for g in result.graded] == RESPONSES
        found = result.metrics()
        for name in ("accuracy", "format", "activation"):
            assert found[name].value == 1
        assert found["threads_per_block"].value == 2
        assert set(result.limits.values()) == {0} and result.ungraded == 0
        total = found["total_tokens"].value
        assert total == sum(len(CODEC.encode(r)) + 1 for r in RESPONSES) / 2
        assert result.tokens_per_second > 0 < result.seconds


def test_threads_shorten_the_path_and_the_steps_and_sequential_mode_does_not():
    parallel, sequential = solve("parallel").metrics(), solve("sequential").metrics()
    total = parallel["total_tokens"].value
    longest = parallel["longest_path_tokens"].value
    assert longest < 0.8 * total
    assert parallel["speedup"].value == pytest.approx(total / longest)
    assert 0.2 < parallel["acceleration"].value < 0.5
    assert parallel["decode_steps"].value < longest + 1
    assert sequential["longest_path_tokens"].value == total == sequential["decode_steps"].value
    assert sequential["acceleration"].value == 0 and sequential["speedup"].value == 1


def test_redundancy_is_of_the_8_grams_of_all_threads():
    once, twice = "a b c d e f g h", "a b c d e f g h i"
    other = "1 2 3 4 5 6 7 8"
    threads = "<Thread>\n1: {}</Thread><Thread>\n2: {}</Thread>"
    block = f"<Parallel>\n<Outlines>\n</Outlines>\n{threads}"
    result = recorded([block.format(once, twice), block.format(other, "9"), "none"])
    assert [g.redundancy for g in result.graded] == [(2, 3), (0, 1), (0, 0)]
    assert result.metrics()["redundancy"].value == pytest.approx(2 / 4)
    assert "redundancy" not in recorded(["none"]).metrics()
    assert graded_row(result.graded[0])["redundancy"] == pytest.approx(2 / 3)
    assert graded_row(result.graded[2])["redundancy"] is None


def test_shares_and_means_are_those_of_the_responses():
    wrong = RESPONSES[0].replace("{602}", "{603}")
    broken = RESPONSES[0].replace("</Outlines>", "", 1)
    plain = "<think>\n</think>\n\\boxed{602}"
    result = recorded([RESPONSES[0], wrong, broken, plain])
    found = result.metrics()
    assert found["accuracy"].value == 3 / 4
    assert found["format"].value == 3 / 4
    assert found["activation"].value == 3 / 4
    lengths = [g.lengths for g in result.graded]
    assert found["total_tokens"].value == sum(x.total_tokens for x in lengths) / 4
    assert found["longest_path_tokens"].value == sum(x.longest_path_tokens for x in lengths) / 4
    assert found["acceleration"].value == pytest.approx(sum(x.acceleration for x in lengths) / 4)
    assert found["decode_steps"].value == 7
    assert result.limits == {"response": 4, "threads": 0, "outlines": 0, "blocks": 0}
    best = max(x.total_tokens / x.longest_path_tokens for x in (*lengths[:1], *lengths[2:]))
    assert result.max_speedup == best
    assert recorded([wrong]).max_speedup is None
    assert "threads_per_block" not in recorded([plain]).metrics()
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_several_samples_of_a_problem_are_one_observation():
    right, wrong = RESPONSES[0], "\\boxed{1}"
    found = recorded([right, wrong, wrong, wrong], samples=2).metrics()
    assert found["accuracy"].value == 1 / 4 and found["pass@2"].value == 1 / 2
    assert "pass@1" not in recorded([right]).metrics()
    twice = recorded([right, right, wrong, wrong], samples=2).metrics()["accuracy"]
    assert twice == recorded([right, wrong]).metrics()["accuracy"]


def test_samples_differ_and_the_same_seed_gives_them_again():
    hot = {"sampling": SamplingParams(temperature=2), "max_tokens": 40}
    first, again = (solve("parallel", samples=3, **hot) for _ in range(2))
    texts = [g.response for g in first.graded]
    assert len(set(texts)) == 6 and texts == [g.response for g in again.graded]
    assert [g.problem for g in first.graded[::3]] == PROBLEMS == first.problems


def test_a_comparison_sets_one_total_against_the_other_path():
    sequential = recorded([RESPONSES[0], "\\boxed{1}"], "sequential")
    parallel = replace(recorded([RESPONSES[0], RESPONSES[0]]), seconds=1.0)
    gain = compare(sequential, parallel)
    total = [g.lengths.total_tokens for g in sequential.graded]
    longest = [g.lengths.longest_path_tokens for g in parallel.graded]
    assert gain.speedup.value == pytest.approx(sum(total) / sum(longest))
    assert gain.max_speedup == total[0] / longest[0]  # the other is not solved by both
    assert gain.wall_clock_speedup == 2
    assert gain.accuracy_difference.value == 1 / 2
    with pytest.raises(ValueError, match="not on the same problems"):
        compare(sequential, solve("parallel"))


def test_limits_are_counted():
    assert solve("parallel", max_tokens=20).limits["response"] == 2
    assert solve("parallel", max_thread_tokens=5).limits["threads"] == 4
    assert solve("parallel", max_threads=1).limits["outlines"] == 2


def test_a_prompt_that_cannot_be_decoded_is_named():
    problems = [PROBLEMS[0], Problem("1" * 2000, "1", "f:9")]
    with pytest.raises(ValueError, match=r"^f:9: the prompt has 2000 tokens"):
        solve("parallel", problems)


def test_progress_ends_with_all_responses():
    engine, seen = Engine(product_model(), CODEC, kv_gigabytes=0.01), []
    settings = GenerationSettings(max_tokens=30, sampling=GREEDY)
    graded: list[int] = []
    evaluate(
        engine,
        TASK,
        PROBLEMS,
        settings,
        samples=2,
        on_progress=seen.append,
        on_graded=graded.append,
    )
    assert seen == sorted(seen) and seen[-1] == 4
    assert graded == [1, 2, 3, 4]


def test_a_dictionary_of_all_figures_is_plain_data():
    record = solve("parallel").as_dict()
    assert record["accuracy"] == {"value": 1.0, "low": pytest.approx(0.342, abs=1e-3), "high": 1.0}
    assert record["problems"] == 2 and record["settings"]["mode"] == "parallel"
    assert {"max_speedup", "limits", "ungraded", "seconds", "tokens_per_second"} < record.keys()


def test_problems_solved_one_at_a_time_get_the_responses_of_all_at_once():
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01)
    settings = GenerationSettings(max_tokens=60, sampling=SamplingParams(1.5))
    seen: list[int] = []
    together = evaluate(engine, TASK, PROBLEMS, settings, samples=2)
    apart = evaluate(
        engine, TASK, PROBLEMS, settings, samples=2, at_once=1, on_progress=seen.append
    )
    ours, theirs = ([g.response for g in e.graded] for e in (apart, together))
    assert ours == theirs
    assert seen == sorted(seen) and seen[-1] == 2 * len(PROBLEMS)
