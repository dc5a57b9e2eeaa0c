"""Right answers of a data file count and wrong ones do not: words are compared as words, numerals
with their base, tiny numbers by value, and a ground truth that is a JSON number by its value."""

import json
import sys
import tempfile
from pathlib import Path

from threadweaver.tasks import load_task

CASES = [  # ground truth as it stands in the file, answer, right
    ("listen", "silent", False),
    ("BAC", "ABC", False),
    ("NOT", "TON", False),
    ("stop", "post", False),
    ("Monday", "Tuesday", False),
    ("\\text{listen}", "\\text{silent}", False),
    ("1011_2", "1011_3", False),
    ("2^{-81}", "2^{-80}", False),
    ("1-\\frac{1}{e}", "1+\\frac{1}{e}", False),
    ("12:00", "1:00", False),
    ("(0,3)", "(0,2)", False),
    ("3x+4y+14=0", "4x+2y+1=0", False),
    ("\\pm 7", "7", False),
    (0.00001, "0.00001", True),
    (0.00001, "10^{-5}", True),
    (2.5e-7, "2.5\\times 10^{-7}", True),
    (1e16, "10^{16}", True),
    (10000000000000000.0, "10000000000000000", True),
    (0.5, "\\frac{1}{2}", True),
    (12, "12", True),
    ("1,000", "1000", True),
    ("\\frac{1}{2}", "\\dfrac{1}{2}", True),
    ("50\\%", "0.5", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("[1,2)", "[1, 2)", True),
    ("(1,2]", "[1,2)", False),
    ("7", "\\text{7}", True),
    ("1.5", "1\\frac{1}{2}", True),
]


def fault() -> str | None:
    path = Path(tempfile.mkdtemp()) / "answers.jsonl"
    rows = [
        {"question": f"{i}?", "reward_model": {"ground_truth": truth}}
        for i, (truth, _, _) in enumerate(CASES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = load_task(str(path), held_out=0.0, seconds=20.0)
    bad = [
        f"{answer!r} for {truth!r} counts as {'wrong' if right else 'right'}"
        for problem, (truth, answer, right) in zip(task.problems("train", None), CASES, strict=True)
        if task.is_correct(f"<think>\na\n</think>\n\\boxed{{{answer}}}", problem) != right
    ]
    return "; ".join(bad) or None


if __name__ == "__main__":
    sys.exit(fault())
