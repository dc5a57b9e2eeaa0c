"""A decoder whose output layer has a bias (phi-1.5, phi-2): add_tags gives a new tag the mean of
the output rows of its word, and a bias is part of a row. Old logits stay, tied tables stay tied."""

import sys
import tempfile

import torch

from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.model import (
    add_tags,
    load_model,
    new_model,
    output_layer,
    save_model,
    trie_hidden_states,
)
from tw_kernels import Trie

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
ARCHS = {
    "phi": {"model_type": "phi", **COMMON},
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        **COMMON,
    },
}
OLD = 300  # tokens before the tags
BIAS = -4.0


def fault() -> str | None:
    for name, arch in ARCHS.items():
        tokenizer = byte_tokenizer()
        model = new_model(tokenizer, arch)
        model.resize_token_embeddings(OLD, mean_resizing=False)
        if (bias := output_layer(model).bias) is not None:
            # A trained bias; what matters is that it is not 0.
            torch.nn.init.constant_(bias, BIAS)
        trie = Trie.from_paths([tokenizer.encode("think of it")])
        before = _logits(model, trie)
        add_tags(tokenizer, model)
        folder = tempfile.mkdtemp()
        save_model(model, tokenizer, folder)
        loaded, _ = load_model(folder)
        after = _logits(loaded, trie)
        if (after[:, :OLD] - before).abs().max() > 1e-5:
            return f"{name}: old logits changed"
        head = output_layer(loaded)
        tied = loaded.get_input_embeddings().weight is head.linear.weight
        if tied != arch.get("tie_word_embeddings", False):
            return f"{name}: tied is {tied}"
        if head.bias is not None and (head.bias[OLD:] - BIAS).abs().max() > 1e-3:
            share = after.softmax(-1)[:, OLD:].sum(-1).mean()
            return f"{name}: new biases are {head.bias[OLD:]}; new rows get {share:.0%}"
    return None


@torch.no_grad()
def _logits(model, trie: Trie) -> torch.Tensor:
    return output_layer(model)(trie_hidden_states(model, trie, trie.layout()))


if __name__ == "__main__":
    sys.exit(fault())
