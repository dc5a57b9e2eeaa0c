"""A lock of the system on an open file: one process at a time works with a file or a folder.

It ends with the process however that ends (kill -9 too), and a copy is not locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"  # of a folder; says who holds it
LOOK_SECONDS = 0.05  # longer than a look by `is_held`, which has the lock for a moment


class InUse(Exception):  # noqa: N818 (named for what was found)
    """Another process holds the lock; says of what, and if it is known which process."""

    def __init__(self, path: Path, owner: str = ""):
        super().__init__(
            f"{path} is in use by {owner or 'another process'}: wait for it to end, or name another"
        )


def open_locked(path: Path) -> IO[bytes]:
    """A file to read and append to, made if need be; locked until it is closed.

    Raises:
        InUse: another process has it open so.
        OSError: it cannot be opened.
    """
    while True:
        file = path.open("a+b")
        try:
            if not _lock(file):
                time.sleep(LOOK_SECONDS)
                if not _lock(file):
                    raise InUse(path)
            # Who held the lock before may have removed the file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


class FolderLock:
    """Held from the start until `release`; makes the folder if need be.

    Raises:
        InUse: another process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open_locked(self._path)
        except InUse as error:
            raise InUse(folder, _owner(self._path)) from error
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            self._file.flush()
        except OSError as error:
            self.release()
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def release(self, undo: bool = False) -> None:
        """Lets others in.

        Args:
            undo: also removes the file and what was made of the folder, if nothing else is there.
        """
        if undo:
            with suppress(OSError):
                self._path.unlink()
                for folder in self._made:
                    folder.rmdir()
        with suppress(OSError):  # on a full disk
            self._file.close()


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder; False where that cannot be known."""
    with suppress(OSError), (folder / LOCK_FILE).open("rb") as file:
        # Shared, so that who looks does not take another who looks for the holder.
        return not _lock(file, fcntl.LOCK_SH)
    return False


def check_free(folder: Path) -> None:
    """Raises InUse if another process works in a folder."""
    if is_held(folder):
        raise InUse(folder, _owner(folder / LOCK_FILE))


def _lock(file: IO[bytes], how: int = fcntl.LOCK_EX) -> bool:
    """Whether this process has it now."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # A file system without locks: there processes have to be kept apart by hand.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    return True


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
