"""LoRA in a run: the adapters of its model, and what its checkpoints are then.

run_dir/base/                    the model that the adapters are for, where model.path is not it
run_dir/checkpoints/step-N/      adapters, as peft writes them, and the tokenizer
run_dir/checkpoints/step-N/merged/  with report.export: a plain Hugging Face folder
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threadweaver import ranks
from threadweaver.model import load_configs
from threadweaver.model.lora import Adapters, base_model, merged_model, why_no_lora
from threadweaver.train.checkpoint import EXPORT
from threadweaver.train.config import ConfigError, LoraConfig, ModelConfig, RunConfig
from threadweaver.train.sharding import export
from threadweaver.trajectory import TAGS
from threadweaver.whole_file import sync


def check_lora(settings: ModelConfig) -> None:
    """Raises ConfigError if adapters are asked for and peft is not there."""
    if settings.lora is not None and (reason := why_no_lora()):
        raise ConfigError(f"model.lora: {reason}")


def adapters_of(
    settings: LoraConfig, model: PreTrainedModel, trained_ids: Sequence[int], seed: int
) -> Adapters:
    """Those of the settings, which the model has from now on.

    Raises:
        ConfigError: targets that the model has not, or a model that cannot be trained so.
    """
    try:
        return Adapters(model, settings.rank, settings.alpha, settings.targets, trained_ids, seed)
    except ValueError as error:
        own = str(error).startswith("targets")
        raise ConfigError(f"model.lora{'.' if own else ': '}{error}") from error


class RunAdapters:
    """The adapters that a run trains.

    Args:
        config: says which; checkpoints name its model.path as what they are for or, where the model
            is another, run_dir/base, which the first `write` writes.
        model: gets them.
        tokenizer: of the model; has the tags, whose rows are trained too.

    Attributes:
        adapters: of the model.

    Raises:
        ConfigError: targets that the model has not, or a model that cannot be trained so.
    """

    def __init__(
        self, config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ):
        settings = config.model.lora
        assert settings is not None
        self._tokenizer = tokenizer
        self._base = Path(config.run_dir).absolute() / "base"
        if config.model.path is not None and _is_stored(model, config.model.path):
            self._base = Path(config.model.path).absolute()
        vocabulary = tokenizer.get_vocab()
        self.adapters = adapters_of(settings, model, [vocabulary[t] for t in TAGS], config.seed)

    @property
    def lacks_base(self) -> bool:
        """Whether the folder of the base is yet to be written."""
        return not self._base.exists()

    def write(self, folder: Path, plain: bool) -> None:
        """Writes the adapters; all ranks call it.

        Args:
            plain: also a plain folder of the merged model in it.
        """
        if ranks.on_first(lambda: self.lacks_base):
            self._write_base()
        if ranks.is_first():
            self.adapters.save(folder, str(self._base))
            self._tokenizer.save_pretrained(folder)
        if plain:
            self._write_plain(folder / EXPORT, merged=True)

    def _write_plain(self, folder: Path, merged: bool) -> None:
        """A plain Hugging Face folder, of the model with its adapters or without."""
        model = self.adapters.model
        if ranks.size() == 1:
            model = merged_model(model) if merged else base_model(model)
        export(model, self._tokenizer, folder, merged)

    def _write_base(self) -> None:
        """Whole or not at all."""
        partial = self._base.with_name(".base.partial")

        def publish() -> None:
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(self._base)
            sync(self._base.parent)

        ranks.on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        self._write_plain(partial, merged=False)
        ranks.on_first(publish)

    def load(self, checkpoint: Path) -> None:
        """Raises ConfigError if it does not hold the adapters of this run."""
        try:
            self.adapters.load(checkpoint)
        except ValueError as error:
            raise ConfigError(
                f"{error}; delete the folder {checkpoint.name} to resume from the checkpoint "
                "before it"
            ) from error


def _is_stored(model: PreTrainedModel, path: str) -> bool:
    """Whether what plain transformers loads from a folder is this model, but for rows that are
    trained."""
    if not (Path(path) / "config.json").is_file():
        return False
    stored, ours = load_configs(path)[0].get_text_config(), model.config.get_text_config()
    names = ("vocab_size", "tie_word_embeddings")
    return all(getattr(stored, name) == getattr(ours, name) for name in names)
