"""Rows of the files that runs write: trajectories to train on, and rollouts with their grades."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from threadweaver.evaluate.grade import Graded

Row = dict[str, Any]


def trajectory_row(prompt: str, response: str, answer: str) -> Row:
    """A trajectory in the columns of `threadweaver.data`."""
    return {
        "question": prompt,
        "response": response,
        "qwen_text": prompt + response,
        "reward_model": {"ground_truth": answer, "style": "rule"},
    }


def graded_row(graded: Graded) -> Row:
    """A rollout and its grade, for JSON."""
    return {
        "question": graded.problem.prompt,
        "ground_truth": graded.problem.answer,
        "response": graded.response,
        "correct": graded.correct,
        "violations": graded.violations,
        "total_tokens": graded.lengths.total_tokens,
        "longest_path_tokens": graded.lengths.longest_path_tokens,
        "limits": asdict(graded.rollout.limits),
        "source": graded.problem.source,
    }
