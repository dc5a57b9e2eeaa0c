"""Files and folders that belong to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threadweaver import lock
from threadweaver.lock import FolderLock, InUse, check_free, open_locked


def test_a_folder_is_refused_while_another_process_has_it_however_that_ends(tmp_path):
    code = (
        "import sys, pathlib; from threadweaver.lock import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        says = f"{tmp_path} is in use by process {holder.pid} on .*: wait for it to end"
        for refused in (FolderLock, check_free):
            with pytest.raises(InUse, match=says):
                refused(tmp_path)
        holder.send_signal(signal.SIGKILL)
    check_free(tmp_path)
    FolderLock(tmp_path).release()


def test_a_lock_that_was_given_back_can_be_had_and_undone_leaves_nothing(tmp_path):
    FolderLock(tmp_path / "a" / "b").release(undo=True)
    assert list(tmp_path.iterdir()) == []
    check_free(tmp_path / "a")
    for _ in range(2):
        FolderLock(tmp_path / "a").release()
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".lock"]


def test_a_file_keeps_what_it_holds_and_is_added_to_at_its_end(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"one\n")
    with open_locked(path) as file:
        with pytest.raises(InUse, match=f"{path} is in use by another process"):
            open_locked(path)
        file.seek(0)
        assert file.readline() == b"one\n"
        file.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_its_holder_removed_in_between_is_made_again(tmp_path, monkeypatch):
    path, take = tmp_path / "f", lock._lock

    def late(file):
        if path.read_bytes():  # another process is done with it, between opening and locking
            path.unlink()
        return take(file)

    path.write_bytes(b"done\n")
    monkeypatch.setattr(lock, "_lock", late)
    with open_locked(path) as file:
        file.write(b"mine\n")
    assert path.read_bytes() == b"mine\n"


def test_who_looks_whether_a_folder_is_held_does_not_keep_others_out(tmp_path, monkeypatch):
    FolderLock(tmp_path).release()
    sleep = time.sleep
    with (tmp_path / ".lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not lock.is_held(tmp_path)  # by another who looks

        def while_waiting(seconds: float) -> None:
            looking.close()
            sleep(seconds)

        monkeypatch.setattr(time, "sleep", while_waiting)
        held = FolderLock(tmp_path)
    assert lock.is_held(tmp_path)
    held.release()
    assert not lock.is_held(tmp_path) and not lock.is_held(tmp_path / "none")


def test_a_file_system_without_locks_has_none_and_other_errors_are_told(tmp_path, monkeypatch):
    number = errno.ENOLCK

    def fails(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fails)
    FolderLock(tmp_path).release()
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        open_locked(Path(tmp_path / "f"))
