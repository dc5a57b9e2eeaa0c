"""An engine from a model on disk, as commands start one."""

from __future__ import annotations

from dataclasses import fields, replace

from transformers import PreTrainedTokenizerBase

from threadweaver.device import DTYPES, choose, find_device, give_back_memory, resolve
from threadweaver.generate.engine import Engine
from threadweaver.generate.options import EngineSettings
from threadweaver.generate.server.address import ServerSettings
from threadweaver.generate.server.engine import ServerEngine, connect
from threadweaver.generate.settings import EngineSizes
from threadweaver.model import (
    end_ids,
    end_ids_of,
    ids_end,
    load_configs,
    load_model,
    load_tokenizer,
    to_device,
)
from threadweaver.trajectory import Codec, TemplateConfig
from threadweaver.trajectory.codec import missing_tags
from threadweaver.trajectory.ids import MOST_IDS


def load_engine(
    model: str,
    settings: EngineSettings,
    parallel: bool,
    template: TemplateConfig | None = None,
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """The engine of a model, and its tokenizer.

    Args:
        model: a Hugging Face folder, a .gguf file, or smollm2.
        parallel: whether it is to decode threads, which needs a tokenizer with the tags.
        template: how prompts become text; default: by the tokenizer's chat template, if any.

    Raises:
        ValueError: no model there, one that cannot be used, or settings out of range.
    """
    device = find_device(settings.device)
    dtype = DTYPES[resolve(settings.precision, device)]
    if parallel:
        # Before the weights, which take long to load.
        Codec.from_tokenizer(load_tokenizer(model), template=template)
    give_back_memory()
    weights, tokenizer = load_model(model, dtype)
    with_tags = parallel or not missing_tags(tokenizer)
    make = Codec.from_tokenizer if with_tags else Codec.without_tags
    codec = make(tokenizer, end_ids(weights), template)
    rows = weights.config.get_text_config().vocab_size
    if ids_end(tokenizer) > rows:
        raise ValueError(
            f"{model}: the tokenizer has ids up to {ids_end(tokenizer) - 1}, and the embedding "
            f"{rows} rows: python -m threadweaver.add_tags --model MODEL --out FOLDER makes them "
            "agree"
        )
    to_device(weights, device)
    sizes = {field.name: getattr(settings, field.name) for field in fields(EngineSizes)}
    return Engine(weights, codec, **sizes), tokenizer


def load_server(
    model: str,
    server: ServerSettings,
    settings: EngineSettings,
    parallel: bool,
    template: TemplateConfig | None = None,
) -> tuple[ServerEngine, PreTrainedTokenizerBase, str]:
    """The engine on a server, the tokenizer, and a line about the server to show.

    Args:
        model: what the server runs: a Hugging Face folder, which needs no weights, a .gguf file, or
            smollm2.
        settings: max_sequences is the most requests that the server has at a time.

    Raises:
        ValueError: as `load_engine`.
        ServerError: as `connect`.
    """
    config, generation_config = load_configs(model)
    tokenizer = load_tokenizer(model)
    with_tags = parallel or not missing_tags(tokenizer)
    make = Codec.from_tokenizer if with_tags else Codec.without_tags
    codec = make(tokenizer, end_ids_of(config, generation_config), template)
    length = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_IDS
    engine, note = connect(
        server,
        codec,
        ids_end(tokenizer),
        length,
        parallel=parallel,
        at_once=settings.max_sequences,
    )
    return engine, tokenizer, note


def check_chat(asked: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for --chat and a tokenizer that has no template."""
    if asked and not tokenizer.chat_template:
        raise ValueError("chat: the tokenizer has no chat template; leave the option out")


def settle_precision(settings: EngineSettings) -> tuple[EngineSettings, str | None]:
    """The settings with precision `auto` resolved, and a line with the reason if it was `auto`."""
    if settings.precision != "auto":
        return settings, None
    precision, reason = choose(find_device(settings.device))
    return replace(settings, precision=precision), f"precision: {precision}, since {reason}"
