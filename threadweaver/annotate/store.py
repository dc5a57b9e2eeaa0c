"""The folder: what every step was given, what it asked and got, and what came of it.

    manifest.json                what the folder was made with
    0-answer/000012.json         the student's response to problem 12, counted from 1
    1-map/000012.json            ... and so 2-cut, 3-independent, 4-outline
    kept.jsonl, rejected.jsonl, summary.json, yield.png

A step is a function of what it is given and of the replies. A reply is in its file, on disk, before
anybody sees it; a step that runs again takes from there what it asked before. So a run that was
killed goes on by running again, and asks nothing twice but what was on its way at the kill.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from threadweaver.annotate.failures import Breach, Step
from threadweaver.annotate.form import Form
from threadweaver.annotate.teacher import Reply
from threadweaver.command import is_writable
from threadweaver.json_file import read_object
from threadweaver.lock import LOCK_FILE, FolderLock, InUse
from threadweaver.trajectory import Message
from threadweaver.whole_file import write_whole

STEPS: tuple[Step, ...] = ("0-answer", "1-map", "2-cut", "3-independent", "4-outline")
MANIFEST = "manifest.json"
OF_TEACHER = (
    *("teacher.model", "teacher.temperature", "teacher.max_tokens", "teacher.extra"),
    *("teacher.constrain", "prompts"),
)

# Asks the teacher: messages, form of the reply, number of the request in its file.
Ask = Callable[[list[Message], Form, int], Awaitable[Reply]]


class Store:
    """A folder that belongs to this process until `close`.

    Args:
        settings: what reaches the results, by name; those of a folder are fixed at its start, and
            those of OF_TEACHER by the first reply in it.

    Raises:
        ValueError: the folder cannot be written, holds something else, was made with other
            settings, or belongs to another process.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self._lock = _take(folder)
        try:
            path = folder / MANIFEST
            settings = json.loads(json.dumps(settings))
            if path.exists():
                made = read_json(path, "settings")["settings"]
                _check_same(path, made, settings, () if self.has_reply else OF_TEACHER)
            elif any(p.name != LOCK_FILE and p.suffix != ".partial" for p in folder.iterdir()):
                raise ValueError(f"out: {folder} is not empty; name a new folder")
            self._settings = settings
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Makes it the folder of these settings."""
        write_json(self.folder / MANIFEST, {"settings": self._settings})

    def close(self) -> None:
        """Lets others in; nothing is left of a folder that was not begun."""
        self._lock.release(undo=not (self.folder / MANIFEST).exists())

    @property
    def has_reply(self) -> bool:
        """Whether it holds a reply of the teacher."""
        return any((self.folder / STEPS[1]).glob("*.json"))

    def log(self, step: str, number: int, given: dict[str, Any], ask: Ask) -> Log:
        """The file of a step of a trajectory, with what it holds already."""
        return Log(self.path(step, number), given, ask)

    def path(self, step: str, number: int) -> Path:
        return self.folder / step / f"{number:06d}.json"


class Log:
    """One step of one trajectory.

    Attributes:
        exchanges: all requests, {"messages", "reply"}, in order.
    """

    def __init__(self, path: Path, given: dict[str, Any], ask: Ask):
        self._path, self._given, self._ask = path, given, ask
        self._asked = 0
        self._breaches: list[dict[str, Any]] = []
        self.exchanges: list[dict[str, Any]] = []
        if path.exists():
            self.exchanges = _exchanges(path)

    async def ask(self, messages: list[Message], form: Form) -> Reply:
        """The reply to the next request: the one on disk if it was asked before."""
        number = self._asked
        if number < len(self.exchanges) and self.exchanges[number]["messages"] != messages:
            del self.exchanges[number:]  # it was asked something else then
        if number == len(self.exchanges):
            reply = await self._ask(messages, form, number)
            self.exchanges.append({"messages": messages, "reply": asdict(reply)})
            self._write({})
        self._asked += 1
        return Reply(**self.exchanges[number]["reply"])

    def breach(self, breach: Breach) -> None:
        """Notes why the reply before cannot be used."""
        self._breaches.append({"kind": breach.kind, "request": self._asked, "why": str(breach)})

    def finish(self, **result: Any) -> None:
        """Writes what came of the step."""
        del self.exchanges[self._asked :]
        self._write(result)

    def _write(self, result: dict[str, Any]) -> None:
        record = {**self._given, "exchanges": self.exchanges, "breaches": self._breaches, **result}
        write_json(self._path, record)


def write_json(path: Path, value: Any) -> None:
    """As `write_whole`. A file that holds it already is left alone: a run that goes on comes by
    all that was done before."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_whole(path, text)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """What was written to a file of the folder, an object with these keys.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return read_object(path, *keys)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, " ".join(str(error).split())) from error


def _exchanges(path: Path) -> list[dict[str, Any]]:
    """The requests in the file of a step. Raises ValueError if it is damaged."""
    found = read_json(path, "exchanges")["exchanges"]
    try:
        for exchange in found:
            Reply(**exchange["reply"])
            list(exchange["messages"])
    except (TypeError, KeyError) as error:
        raise damaged(path, "a request in it has no reply") from error
    return found


def damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not what annotate wrote ({reason}): delete it and run again")


def _check_same(path: Path, made: Any, settings: dict[str, Any], free: Container[str]) -> None:
    if not isinstance(made, dict):
        raise damaged(path, "its settings are no object")
    if isinstance(made.get("generation"), dict):
        made["generation"].pop("max_tokens", None)  # earlier versions fixed it too
    for name, value in settings.items():
        if name not in free and made.get(name) != value:
            raise ValueError(
                f"{name} is {str(value)[:80]}, and {path.parent} was made with "
                f"{str(made.get(name))[:80]}: give the same, or another --out"
            )


def _take(folder: Path) -> FolderLock:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; name a folder")
    if not is_writable(folder):
        raise ValueError(f"out: {folder} cannot be written; name another folder")
    try:
        return FolderLock(folder)
    except InUse as error:
        raise ValueError(f"out: {error}") from error
    except OSError as error:
        where = error.filename or folder
        raise ValueError(f"out: {where}: {error.strerror}; name another folder") from error
