"""Problems of reasoning-gym with responses of a scripted student, and a student to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.model import add_tags, new_model, save_model
from threadweaver.tasks import load_task

# Two parts, the shorter of more than 200 characters; the stub goes by First, Second and Together.
RESPONSE = """<think>
I am to compute {expression} and to give the result.

First, I take the terms in the order in which they are written and keep a running total.
The running total changes with each of the terms by exactly as much as the sign says, no more.
After the last of the terms the running total is {answer}, which is what I was looking for here.

Second, in the same way as the first, I take all the terms with a plus and all with a minus.
I add up the ones of either kind by themselves, and subtract the second sum from the first sum.
The difference of the two sums comes out as {answer} once more, by a path of its own in the end.

Together, both ways agree, so I trust the result.
</think>

\\boxed{{{answer}}}"""


def gym_rows(count: int) -> list[dict[str, Any]]:
    """Right responses to sums."""
    rows = []
    for problem in load_task("reasoning_gym:chain_sum").problems("train", count):
        expression = str(problem.prompt).partition(": ")[2].partition(" =")[0]
        response = RESPONSE.format(expression=expression, answer=problem.answer)
        rows.append({"question": problem.prompt, "answer": problem.answer, "response": response})
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_student(folder: Path) -> str:
    """A model of one small layer, with the tags."""
    tokenizer = byte_tokenizer()
    add_tags(tokenizer)
    arch = {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 8192,
    }
    save_model(new_model(tokenizer, arch), tokenizer, folder)
    return str(folder)
