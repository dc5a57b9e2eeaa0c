"""A base whose generation_config transformers reads and refuses to write, as of several published
models (temperature without do_sample), is trained and saved all the same."""

import json
import sys
import tempfile
from pathlib import Path

from tests.cases._runs import ARCH, train
from threadweaver.add_tags import main as add_tags
from threadweaver.data import save_rows
from threadweaver.model import build_tokenizer, load_model, new_model, save_model

RESPONSE = "<think>\na\n</think>\n\\boxed{7}"


def fault() -> str | None:
    root = Path(tempfile.mkdtemp())
    base, tagged, run, rows = (root / name for name in ("base", "tagged", "run", "rows.jsonl"))
    tokenizer = build_tokenizer()
    save_model(new_model(tokenizer, ARCH), tokenizer, base)
    path = base / "generation_config.json"
    refused = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "early_stopping": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **refused}))
    save_rows([{"question": f"{i}?\n", "response": RESPONSE} for i in range(8)], rows)
    if code := add_tags(["--model", str(base), "--out", str(tagged)]):
        return f"add_tags ended with {code}"
    options = {
        "run_dir": run,
        "model.path": base,
        "data.train": rows,
        "optimization.max_steps": 2,
        "optimization.batch_tokens": 256,
    }
    if code := train("sft", options):
        return f"sft ended with {code} after its steps"
    for folder in (tagged, run / "checkpoints/step-2"):
        saved = load_model(folder)[0].generation_config
        assert saved is not None
        if (saved.do_sample, saved.temperature, saved.eos_token_id) != (False, None, 1):
            return f"{folder.name} has {saved}"
    return None


if __name__ == "__main__":
    sys.exit(fault())
