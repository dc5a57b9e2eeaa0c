"""The lock on the folder of a run: one process at a time.

It is a lock of the system on the open file `.lock`, so it ends with the process however that ends
(kill -9 too), and a copy of the folder is not locked. The file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from threadweaver.train.config import ConfigError

LOCK_FILE = ".lock"


class RunLock:
    """Held from the start until `release`; makes the folder if need be.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK_FILE
        self._made = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"run_dir: {error.filename or run_dir} cannot be written ({error.strerror}); name "
                "another folder"
            ) from error

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

    def _take(self) -> IO[str]:
        while True:
            file = self._path.open("a", encoding="utf-8")
            _lock(file, self._path)
            # It may have been removed in between by a process that could not begin its run.
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == self._path.stat().st_ino:
                    return file
            file.close()


def check_free(run_dir: Path) -> None:
    """Raises ConfigError if another process works in a run's folder."""
    path = run_dir / LOCK_FILE
    with suppress(OSError), path.open(encoding="utf-8") as file:
        _lock(file, path)


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()
        raise ConfigError(
            f"run_dir: {path.parent} is in use by {owner or 'another process'}: wait for it to "
            "end, or name another folder"
        ) from error
    except OSError as error:
        # A file system without locks: runs there have to be kept apart by hand.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
