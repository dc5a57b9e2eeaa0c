"""A task of your own: how often two letters occur in a word, a thread for each letter.

    pip install ./examples/own_task
    threadweaver tasks write --task letters --options.length 8 --out data/letters
    threadweaver train pipeline --config configs/demo.yaml --run_dir runs/letters \\
        --task.name letters --task.options '{length: 12}'

pyproject.toml beside this file registers it: an entry point of the group `threadweaver.tasks` names
what is called with the task's options. See `threadweaver.tasks.Task` for what a task has.
"""

import random

from threadweaver.tasks import Problem, Split
from threadweaver.tasks.boxed import boxed_answer
from threadweaver.tasks.task import is_held_out

HELD_OUT = 0.1


class Letters:
    """Words of `length` letters a, b and c; the answer is how many are a or b."""

    ungraded = 0  # comparing numbers always ends

    def __init__(self, length: int = 12):
        if length < 1:
            raise ValueError(f"length is {length}: it must be at least 1")
        self.length = length

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """`n` different problems; those whose text is held out make up the validation split."""
        words = 3**self.length
        share = HELD_OUT if split == "validation" else 1 - HELD_OUT
        if n is None:
            raise ValueError("letters makes problems on demand: say how many (--n, task.problems)")
        if n > words * share / 2:
            raise ValueError(
                f"letters: length {self.length} has {words} words, too few for {n} of "
                f"{split}; give a greater length or ask for fewer"
            )
        draw = random.Random(seed)
        found: dict[str, Problem] = {}
        while len(found) < n:
            word = "".join(draw.choices("abc", k=self.length))
            prompt = f"a, b in {word}?\n"
            if is_held_out(prompt, HELD_OUT) == (split == "validation"):
                answer = str(word.count("a") + word.count("b"))
                found[prompt] = Problem(prompt, answer, f"letters of seed {seed}", data=word)
        return list(found.values())

    def is_correct(self, response: str, problem: Problem) -> bool:
        """Whether the last box after the thinking holds the number."""
        return boxed_answer(response) == problem.answer

    def demonstration(self, problem: Problem, parallel: bool) -> str:
        """A worked response, with a block of two threads or without."""
        counts = [f"{letter} {problem.data.count(letter)}" for letter in "ab"]
        if parallel:
            outlines = "\n".join(
                f"<Outline>{i}: count {c[0]}</Outline>" for i, c in enumerate(counts, 1)
            )
            threads = "".join(f"<Thread>\n{i}: {c}</Thread>" for i, c in enumerate(counts, 1))
            work = f"<Parallel>\n<Outlines>\n{outlines}\n</Outlines>\n{threads}\n</Parallel>"
        else:
            work = "\n".join(counts)
        return f"<think>\n{work}\nsum {problem.answer}\n</think>\n\\boxed{{{problem.answer}}}"
