"""A folder as one .tar.gz file, which is replaced in one step: a reader never sees a part of it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

LEVEL = 6  # of gzip


def pack(file: Path, folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> None:
    """Writes the files of a folder that are to be kept."""
    partial = file.with_name(file.name + ".partial")
    with tarfile.open(partial, "w:gz", compresslevel=LEVEL) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and keep(path):
                archive.add(path, path.relative_to(folder))
    partial.replace(file)


def unpack(file: Path, folder: Path) -> None:
    """Puts the files of an archive into a folder.

    Raises:
        OSError, tarfile.TarError: it cannot be read.
    """
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
