"""Files that are there whole or not at all, and on disk once they are there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of the block; if that
    ends by an error, `path` stays as it was. Folders are made if need be.

    Raises:
        OSError: it cannot be written, as on a full disk; names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.replace(path)
        with suppress(OSError):  # not every file system can do that with a folder
            sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its pieces, in UTF-8. As `whole_file`."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines([text] if isinstance(text, str) else text)


def sync(path: Path) -> None:
    """Waits until what was written to a file, or in a folder, is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
