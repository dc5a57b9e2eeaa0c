"""Which tokens end a response, by the model's own configs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from threadweaver.trajectory.ids import token_ids


def end_ids(model: PreTrainedModel) -> list[int]:
    """The ids of eos_token_id, one or a list, in generation_config and config; ascending.

    The tokenizer's own eos_token ends a response too (docs/semantics.md, "State machine").

    Raises:
        ValueError: one is no token id; names the field.
    """
    return end_ids_of(model.config, model.generation_config)


def end_ids_of(config: Any, generation_config: Any) -> list[int]:
    """`end_ids` of a model that has these configs."""
    found: set[int] = set()
    configs = {"generation_config": generation_config, "config": config.get_text_config()}
    for name, config in configs.items():
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            ids = ids if isinstance(ids, list | tuple) else [ids]
            found.update(token_ids(ids, f"{name}.eos_token_id"))
    return sorted(found)
