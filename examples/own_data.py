"""Training on a file of your own: writes one, then fine-tunes a small new model on it.

    python examples/own_data.py [--out FOLDER] [--steps N]

A row is a question and a response in the trajectory format. With --model.path FOLDER in place of
--model.arch the command below trains a model that you have; its tokenizer gets the tags it lacks.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from threadweaver.data import save_rows

RESPONSE = """<think>
<Parallel>
<Outlines>
<Outline>1: double {a}</Outline>
<Outline>2: double {b}</Outline>
</Outlines>
<Thread>
1: {a}+{a}={aa}</Thread><Thread>
2: {b}+{b}={bb}</Thread>
</Parallel>
{aa}+{bb}={sum}
</think>
\\boxed{{{sum}}}"""
ARCH = (
    "{model_type: qwen3, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, max_position_embeddings: 512}"
)


def row(a: int, b: int) -> dict[str, str]:
    numbers = {"a": a, "b": b, "aa": 2 * a, "bb": 2 * b, "sum": 2 * (a + b)}
    return {"question": f"2*({a}+{b})=?\n", "response": RESPONSE.format(**numbers)}


parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("runs/own-data"))
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

file = options.out / "train.jsonl"
save_rows([row(a, b) for a in range(10, 20) for b in range(10, 20)], file)
command = [sys.executable, "-m", "threadweaver.train", "sft", "--data.train", str(file)]
command += ["--run_dir", str(options.out / "run"), "--model.arch", ARCH]
command += ["--optimization.max_steps", str(options.steps)]
command += ["--optimization.batch_tokens", "1024", "--optimization.learning_rate", "1e-3"]
sys.exit(subprocess.run(command).returncode)
