"""Reads what torch.distributed.checkpoint wrote, and runs nothing that a file says.

PyTorch's own reader unpickles `.metadata`, and values that are no tensors, without restriction: a
checkpoint of strangers could run any code.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

# What `.metadata` may name.
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    **{("torch", n): value for n, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(module, "PosixPath"): Path for module in ("pathlib", "pathlib._local")},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which no checkpoint has"
            ) from None


class ShardReader(FileSystemReader):
    """Of a folder that `FileSystemWriter` wrote; errors begin with the name of the file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                found = _MetadataUnpickler(stream).load()
        except Exception as error:  # whatever damaged bytes make of the unpickler
            raise _of_file(file.name, error) from error
        if not isinstance(found, Metadata):
            raise ValueError(f"{file.name}: it holds no metadata")
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            of_files.setdefault(name, []).append(item)
        for name, items in of_files.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except torch.OutOfMemoryError:
                raise  # of the device: the file may be sound
            except Exception as error:  # whatever damaged bytes make of the reader
                raise _of_file(name, error) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


class SafeLoadPlanner(DefaultLoadPlanner):
    """PyTorch's own, which takes of what are no tensors only numbers, strings and the like."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises of all else
        value.seek(0)
        super().load_bytes(read_item, value)


def _of_file(name: str, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ValueError(f"{name}: {reason.strip() or type(error).__name__}")
