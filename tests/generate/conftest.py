"""A model of 60,000 parameters that has memorised a few trajectories: blocks, joins, nesting."""

from __future__ import annotations

import pytest
import torch
from rollouts import CODEC, EOS, ids
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from threadweaver.model import ATTENTION, supervised_tokens, trie_loss
from threadweaver.trajectory import loss_trie
from tw_kernels import Trie


def block(*threads: str) -> str:
    outlines = "".join(f"<Outline>{n}:a{n}</Outline>" for n in range(1, len(threads) + 1))
    bodies = "".join(f"<Thread>\n{n}:{text}</Thread>" for n, text in enumerate(threads, 1))
    return f"<Parallel><Outlines>{outlines}</Outlines>\n{bodies}\n</Parallel>"


# By prompt; the model opens blocks two levels deep.
TRAJECTORIES = {
    "0:": "ab ba. ab ba. 0123456789" * 2,
    "1:": "a " + block("aab 123", "b. ab. ab", "456 ba") + " b.",
    "2:": block("aaaa", "bb") + "ab" + block("1a2b3a", "b", "0000 1111", "a.b.") + "x",
    "3:": "x" + block("b a", "a b") + block("12", "345678") + "9" + block("a") + "b",
    "4:": "a" + block("ab" + block("12", "3456", "789") + "ba", "x" + block("b", "a") + "x") + "b",
}


@pytest.fixture(scope="session")
def fork_join_model() -> PreTrainedModel:
    """Vocabulary and tags of rollouts.CODEC, float32; greedy decoding gives TRAJECTORIES."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=EOS,
    )
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=ATTENTION)
    tries = []
    for prompt, response in TRAJECTORIES.items():
        start = ids(prompt)
        whole = [*start, *ids(response), EOS]
        tries.append(loss_trie(whole, CODEC, len(start), "completions", max_depth=2).trie)
    trie = Trie.pack(tries)
    layout, supervised = trie.layout("cpu"), supervised_tokens(trie).numel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.zeros(())
    for _ in range(150):
        loss = trie_loss(model, trie, layout) / supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    return model.eval()
