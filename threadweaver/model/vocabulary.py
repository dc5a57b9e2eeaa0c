"""Adds the tags to a tokenizer and a model that lack them (docs/semantics.md, "Trajectory")."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from threadweaver.model.logits import mask_unknown_ids
from threadweaver.trajectory import TAGS
from threadweaver.trajectory.codec import missing_tags

_ROWS_MULTIPLE = 64


def add_tags(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[str]:
    """Makes every tag one special token, in place, and gives the model rows for them.

    The embedding of a new tag, its output row if the two tables are untied, and its output bias if
    there is one, start as the means of those of the bare word's tokens: "Thread" for <Thread> and
    </Thread>. The tables grow to a multiple of 64 rows and never shrink; rows that no token uses
    get the mean of the old table.
    Tags that are there already keep their ids and rows.

    Returns:
        The tags that were added to the tokenizer.
    """
    missing = missing_tags(tokenizer)
    tokens: list[str | AddedToken] = [
        AddedToken(tag, special=True, normalized=False) for tag in missing
    ]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if model is not None:
        _extend_model(model, tokenizer, missing)
        mask_unknown_ids(model, tokenizer)
    return missing


def ids_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than its largest id. It may have fewer tokens: some leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def table_rows(old_rows: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of a model's tables once it has one for every token of the tokenizer."""
    return -(-max(old_rows, ids_end(tokenizer)) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def _extend_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: list[str]
) -> None:
    vocab = tokenizer.get_vocab()
    old_rows = _tables(model)[0].shape[0]
    rows = table_rows(old_rows, tokenizer)
    # A tag may be new to the model though the tokenizer came with it.
    new_tags = [tag for tag in TAGS if tag in added or vocab[tag] >= old_rows]
    if rows != old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            mean = table[:old_rows].mean(dim=0, dtype=torch.float32)
            table[old_rows:] = mean.to(table.dtype)
            for tag in new_tags:
                word = tokenizer.encode(tag.strip("</>"), add_special_tokens=False)
                # A small vocabulary may have no token for the word at all.
                start = table[word].mean(dim=0, dtype=torch.float32) if word else mean
                table[vocab[tag]] = start.to(table.dtype)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """All that has a row for each token: the embedding [rows, width]; the output table, if it is
    not the same tensor; the output bias [rows], if there is one."""
    tables = [model.get_input_embeddings().weight]
    if (output := model.get_output_embeddings()) is not None:
        if output.weight is not tables[0]:
            tables.append(output.weight)
        if getattr(output, "bias", None) is not None:
            tables.append(output.bias)
    return cast("list[Tensor]", tables)
