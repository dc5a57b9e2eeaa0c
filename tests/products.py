"""A model of 60,000 parameters that has memorised two products, in both modes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from threadweaver.model import build_tokenizer, new_model, save_model, supervised_tokens, trie_loss
from threadweaver.tasks.multiplication import question, trajectory
from threadweaver.trajectory import Codec, loss_trie
from tw_kernels import Trie

TOKENIZER = build_tokenizer()
CODEC = Codec.from_tokenizer(TOKENIZER)
FACTORS = [(7, 86), (5, 27)]
PROMPTS = [question(factors) for factors in FACTORS]
RESPONSES = [trajectory(factors, parallel=True) for factors in FACTORS]
ARCH = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@cache
def product_model() -> PreTrainedModel:
    """Greedy decoding of PROMPTS gives RESPONSES; float32, not to be changed."""
    model = new_model(TOKENIZER, ARCH)
    tries = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        start = CODEC.encode(prompt)
        ids = [*start, *CODEC.encode(response), CODEC.eos_id]
        tries.append(loss_trie(ids, CODEC, len(start), "response").trie)
    trie = Trie.pack(tries)
    layout, supervised = trie.layout("cpu"), supervised_tokens(trie).numel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.zeros(())
    for _ in range(180):
        loss = trie_loss(model, trie, layout) / supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    return model.eval()


def save_product_model(folder: Path) -> str:
    save_model(product_model(), TOKENIZER, folder)
    return str(folder)
