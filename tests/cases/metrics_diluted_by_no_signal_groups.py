"""P-GRPO logs entropy, KL and mismatch as means over the tokens they were computed on: the same
model writes the same responses twice, of which in one run every group has a signal and in the other
one of four. Entropy is the model's, so it stays."""

import sys
import tempfile
from pathlib import Path

from tests.cases._runs import ARCH, Task, first_record
from threadweaver.model import build_tokenizer, new_model, save_model
from threadweaver.tasks import Problem


class EveryOther(Task):
    """Every other response is right, to these problems."""

    def __init__(self, sources: set[str]):
        self.sources, self.calls = sources, 0

    def is_correct(self, response: str, problem: Problem) -> bool:
        self.calls += 1
        return self.calls % 2 == 0 and problem.source in self.sources


def fault() -> str | None:
    entropies = []
    for signals in (4, 1):
        base = Path(tempfile.mkdtemp()) / "base"
        tokenizer = build_tokenizer()
        save_model(new_model(tokenizer, ARCH), tokenizer, base)
        task = EveryOther({f"row {i}" for i in range(signals)})
        record = first_record(base, {}, task)
        if record is None or record["no_signal_groups"] != 4 - signals:
            return f"{signals} groups were to have a signal: {record}"
        entropies.append(record["entropy"])
    every, one = entropies
    if abs(one - every) > 0.2 * every:
        return f"entropy {every:.3f} if every group has a signal, {one:.3f} if one of four has"
    return None


if __name__ == "__main__":
    sys.exit(fault())
