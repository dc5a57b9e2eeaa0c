"""P-GRPO on a model with residual dropout (phi-2 and gpt2 ship 0.1): the log-probabilities that the
loss compares with the generator's are those of the whole network."""

import sys
import tempfile
from pathlib import Path

from tests.cases._runs import first_record
from threadweaver.model import build_tokenizer, new_model, save_model

ARCH = {
    "model_type": "phi",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
}


def fault() -> str | None:
    mismatches = []
    for dropout in (0.0, 0.1):
        base = Path(tempfile.mkdtemp()) / "base"
        tokenizer = build_tokenizer()
        arch = {**ARCH, "resid_pdrop": dropout, "embd_pdrop": dropout}
        save_model(new_model(tokenizer, arch), tokenizer, base)
        record = first_record(base, {})
        if record is None or not record["updates"]:
            return f"dropout {dropout}: no step was taken"
        mismatches.append(record["max_mismatch"])
    without, with_dropout = mismatches
    if with_dropout > 100 * max(without, 1e-6):
        return f"max |log p(trainer) - log p(generator)|: {with_dropout:.2g}, not {without:.1e}"
    return None


if __name__ == "__main__":
    sys.exit(fault())
