"""Step 5: what is right, well formed and has something parallel left is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from threadweaver.annotate.failures import LeftOut
from threadweaver.data import trajectory_row
from threadweaver.tasks import GradesInBackground, Problem, Task
from threadweaver.trajectory import Codec, check_format, path_lengths


def grading(task: Task, response: str, problem: Problem) -> Callable[[], bool]:
    """Starts to grade a response; what it returns gives the verdict."""
    if isinstance(task, GradesInBackground):
        return task.submit(response, problem)
    right = task.is_correct(response, problem)
    return lambda: right


def kept_row(problem: Problem, response: str, is_right: bool, codec: Codec) -> dict[str, Any]:
    """The row of `kept.jsonl`: the columns that SFT reads, and the path metrics of the response,
    its end token not counted.

    Raises:
        LeftOut: it is not to be kept.
    """
    prompt = codec.prompts.text(problem.prompt)
    response = codec.prompts.after(problem.prompt, response)
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    if breaches := check_format(opened + response):
        raise LeftOut("5-keep", "breaks the format", breaches[0])
    if "<Parallel>" not in response:
        raise LeftOut("5-keep", "nothing parallel is left")
    if not is_right:
        raise LeftOut("5-keep", "the answer is not right any more")
    row = trajectory_row(problem.prompt, response, problem.answer)
    lengths = path_lengths(codec.encode(response), codec)
    return row | {"source": problem.source} | lengths.as_dict()
