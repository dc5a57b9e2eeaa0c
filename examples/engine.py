"""The engine from Python: several responses to one prompt, their threads decoded together.

    python examples/engine.py [--model FOLDER] [--prompt TEXT]

Without --model it makes a small model of random weights, which writes nonsense.
"""

import argparse

from threadweaver.generate import Engine, GenerationSettings
from threadweaver.model import build_tokenizer, end_ids, load_model, new_model
from threadweaver.trajectory import Codec

ARCH = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--model", help="Hugging Face folder whose tokenizer has the tags")
parser.add_argument("--prompt", default="47*86=?\n")
options = parser.parse_args()

if options.model:
    model, tokenizer = load_model(options.model)
else:
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, ARCH)

codec = Codec.from_tokenizer(tokenizer, end_ids(model))
engine = Engine(model, codec, kv_gigabytes=0.1)
for seed in range(4):
    engine.add(codec.encode(options.prompt), GenerationSettings(max_tokens=200), seed)
for rollout in engine.run():
    tokens, steps = len(rollout.response), rollout.decode_steps
    print(f"{tokens} tokens in {steps} steps: {codec.decode(rollout.response)[:60]!r}")
