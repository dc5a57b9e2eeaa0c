"""Rows of a model's tables that are trained while the tables stay as they are.

An adapter changes hidden states, not what a token is: two tags with the same row, as new ones have,
are one and the same to it. So their rows are trained themselves, in float32, and stand in for those
of the tables: in what the embedding looks up, and in the products of the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from threadweaver.model.whole import whole


class TrainedRows(NamedTuple):
    """ids int64 [T], ascending, and their rows float32 [T, hidden size]."""

    ids: Tensor
    rows: Tensor

    def replace_products_(self, products: Tensor, hidden: Tensor) -> Tensor:
        """Makes products [..., rows of the table] of hidden states [..., hidden size] those with
        these rows, in place."""
        own = F.linear(hidden, self.rows.to(hidden.dtype))
        return products.index_copy_(-1, self.ids, own.to(products.dtype))


def train_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """From now on the rows of these tokens are parameters, `trained_rows` of each table: one if the
    tables are tied.

    Raises:
        ValueError: the output layer has a bias, which peft would drop.
    """
    embedding, output = _tables(model)
    if getattr(output, "bias", None) is not None:
        raise ValueError(
            f"the output layer of {model.config.model_type} has a bias, which peft leaves out "
            "where rows are trained: train the model as a whole"
        )
    sorted_ids = torch.tensor(sorted(ids), device=model.device)
    for table in (embedding, output):
        if table is output and output.weight is embedding.weight:
            table.trained_rows = embedding.trained_rows
        else:
            rows = whole(table.weight)[sorted_ids].to(torch.float32, copy=True)
            table.trained_rows = nn.Parameter(rows)
        table.register_buffer("trained_ids", sorted_ids, persistent=False)
        vars(table)["uses_trained_rows"] = True
    embedding.register_forward_hook(_look_up)


def _tables(model: PreTrainedModel) -> tuple[Any, Any]:
    """The embedding and the output layer."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def rows_of(table: Any) -> TrainedRows | None:
    """The rows that stand in for some of a table's, if there are any."""
    if not getattr(table, "uses_trained_rows", False):
        return None
    return TrainedRows(table.trained_ids, table.trained_rows)


def _look_up(embedding: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A forward hook: puts the trained rows where the table's own were looked up."""
    found = rows_of(embedding)
    if found is None:
        return out
    tokens = args[0]
    at = torch.searchsorted(found.ids, tokens).clamp(max=len(found.ids) - 1)
    rows = F.embedding(at, found.rows)
    if (scale := getattr(embedding, "embed_scale", None)) is not None:  # Gemma's, after its lookup
        rows = rows * scale
    return torch.where((found.ids[at] == tokens).unsqueeze(-1), rows.to(out.dtype), out)


@contextmanager
def tables_alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the tables' own rows are used."""
    tables = [m for m in model.modules() if getattr(m, "uses_trained_rows", False)]
    for table in tables:
        vars(table)["uses_trained_rows"] = False
    try:
        yield
    finally:
        for table in tables:
            vars(table)["uses_trained_rows"] = True


def put_into_tables(model: PreTrainedModel) -> None:
    """Gives the model, and none that it shares its tables with, tables on the CPU that hold the
    trained rows; none are trained any more."""
    embedding, output = _tables(model)
    is_tied = output.weight is embedding.weight
    for table in (embedding, output):
        if table is output and is_tied:
            table.weight = embedding.weight
        elif found := rows_of(table):
            weight = table.weight.detach().to("cpu", copy=True)  # a GPU may have no room
            weight[found.ids.cpu()] = found.rows.detach().to(weight)
            table.weight = nn.Parameter(weight, requires_grad=False)
    drop_rows(model)


def drop_rows(model: PreTrainedModel) -> None:
    """Makes its tables plain ones again."""
    for table in _tables(model):
        table.trained_rows = None
        table.trained_ids = None
        vars(table)["uses_trained_rows"] = False
