"""An output table with more rows than the tokenizer has tokens (Qwen: 151,936 rows): no id without
a token is ever sampled, so that a response reads back as the ids that were sampled."""

import sys
import tempfile

import torch

from tests.cases._runs import ARCH
from threadweaver.generate import GenerationSettings
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.model import build_tokenizer, new_model, save_model


def fault() -> str | None:
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, {**ARCH, "tie_word_embeddings": False})
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    folder = tempfile.mkdtemp()
    save_model(model, tokenizer, folder)
    engine, tokenizer = load_engine(
        folder, EngineSettings(device="cpu", kv_gigabytes=0.01), parallel=True
    )
    ids = engine.codec.encode("47*86=?\n")
    for seed in range(20):
        engine.add(ids, GenerationSettings(max_tokens=40), seed=seed)
    completions = [c for rollout in engine.run() for c in rollout.completions]
    sampled = [id for completion in completions for id in completion.tokens]
    unknown = [id for id in sampled if id >= len(tokenizer)]
    if unknown:
        return f"{len(unknown)} of {len(sampled)} sampled ids have no token, {min(unknown)} say"
    return None


if __name__ == "__main__":
    sys.exit(fault())
