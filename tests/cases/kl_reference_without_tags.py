"""policy.kl with a base whose tokenizer lacks the tags, with and without spare rows for them in its
table (Qwen3: 151,936 rows for 151,669 tokens): the reference gets the tags as the policy does, so
that KL is 0 before the first update."""

import sys
import tempfile
from pathlib import Path

import torch

from tests.cases._runs import ARCH, first_record
from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.model import new_model, save_model


def fault() -> str | None:
    for spare in (False, True):
        base = Path(tempfile.mkdtemp()) / "base"
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        model = new_model(tokenizer, {**ARCH, "tie_word_embeddings": True})
        if not spare:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        save_model(model, tokenizer, base)
        record = first_record(base, {"policy.kl": 0.1})
        if record is None:
            return f"spare rows {spare}: refused"
        if not record["updates"]:
            return "no group had a signal: this case shows nothing"
        if record["kl"] > 1e-6:
            return f"spare rows {spare}: the first KL is {record['kl']:.3g}"
    return None


if __name__ == "__main__":
    sys.exit(fault())
