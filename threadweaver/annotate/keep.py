"""Step 5: what is right, well formed and has something parallel left is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from threadweaver.annotate.failures import LeftOut, Step
from threadweaver.data import trajectory_row
from threadweaver.tasks import GradesInBackground, Problem, Task
from threadweaver.trajectory import Codec, path_lengths, violations


def grading(task: Task, response: str, problem: Problem) -> Callable[[], bool]:
    """Starts to grade a response; what it returns gives the verdict."""
    if isinstance(task, GradesInBackground):
        return task.submit(response, problem)
    right = task.is_correct(response, problem)
    return lambda: right


def trained_response(problem: Problem, response: str, codec: Codec, step: Step) -> str:
    """A response as SFT trains on it, after the text of its prompt.

    Raises:
        LeftOut: it breaks the format there, as one that never closes the thinking that the prompt
            opened.
        ValueError: the chat template refuses the prompt; names the problem.
    """
    try:
        prompt = codec.prompts.text(problem.prompt)
    except ValueError as error:
        raise ValueError(f"{problem.source}: {error}") from error
    response = codec.prompts.after(problem.prompt, response)
    if breaches := violations(prompt, response):
        raise LeftOut(step, "breaks the format", breaches[0])
    return response


def kept_row(problem: Problem, response: str, is_right: bool, codec: Codec) -> dict[str, Any]:
    """The row of `kept.jsonl`: the columns that SFT reads, and the path metrics of the response,
    its end token not counted.

    Raises:
        LeftOut: it is not to be kept.
    """
    response = trained_response(problem, response, codec, "5-keep")
    if "<Parallel>" not in response:
        raise LeftOut("5-keep", "nothing parallel is left")
    if not is_right:
        raise LeftOut("5-keep", "the answer is not right any more")
    row = trajectory_row(problem.prompt, response, problem.answer)
    lengths = path_lengths(codec.encode(response), codec)
    return row | {"source": problem.source} | lengths.as_dict()
