"""Responses on disk as they are decoded: a command that was killed goes on where it was.

FILE.partial, beside the file that the command is to write, until that is written. Its first line
holds the settings that the responses depend on; every other line is a response, with the tokens of
all its requests, of which the state machine makes the same rollout again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.lock import InUse, open_locked
from threadweaver.trajectory import Codec

VERSION = 1


class LogError(ValueError):
    """A log that cannot be continued; says in one line why, and what to do."""


class Key(NamedTuple):
    """Which response: the mode, the number of its problem and of its sample, both from 0."""

    mode: str
    problem: int
    sample: int


class ResponseLog:
    """The responses of one command.

    Args:
        target: the file that the command is to write.
        settings: what the responses depend on, as JSON has it.
        restart: whether responses of other settings are to be given up.

    Attributes:
        rows: where the line of each response begins in the file, by key.

    Raises:
        LogError: it holds responses of other settings, is in use, or is damaged.
        OSError: it cannot be opened.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], *, restart: bool = False):
        self.path = partial_of(target)
        self.rows: dict[Key, int] = {}
        self._elapsed: dict[str, float] = {}  # by mode
        self._failed = False  # the disk is full, say
        settings = json.loads(json.dumps({"version": VERSION, **settings}))
        try:
            self._file = open_locked(self.path)
        except InUse as error:
            raise LogError(str(error)) from error
        try:
            whole = self._read(settings, restart)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise
        if whole == 0:
            self._write({"settings": settings})

    def _read(self, settings: Mapping[str, Any], restart: bool) -> int:
        """Finds the rows; returns how many bytes of the file are whole lines of these settings."""
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote
            try:
                row = json.loads(line)
                if number == 1:
                    if differing := difference(row["settings"], settings):
                        if restart:
                            return 0
                        raise LogError(
                            f"{self.path} was begun with {differing}: give the same settings to go "
                            "on with it, name another file, or start afresh with --overwrite"
                        )
                else:
                    self._found(row, whole)
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, LogError):
                    raise
                if restart:
                    self.rows.clear()
                    self._elapsed.clear()
                    return 0
                raise LogError(
                    f"{self.path}:{number}: damaged; delete the file, or start afresh with "
                    "--overwrite"
                ) from error
            whole += len(line)
        return whole

    def _found(self, row: Mapping[str, Any], begin: int) -> None:
        """Takes note of a row that is in the file."""
        key = Key(*row["key"])
        self._elapsed[key.mode] = max(self.elapsed(key.mode), row["elapsed"])
        self.rows[key] = begin

    def add(self, key: Key, rollout: Rollout, text: str, elapsed: float) -> None:
        """Writes a response, unless it failed before, of which there was a warning.

        Args:
            text: of it, for who looks at the file.
            elapsed: seconds of decoding in its mode so far.
        """
        self.add_row(response_row(key, rollout, text), elapsed)

    def add_row(self, row: dict[str, Any], elapsed: float) -> None:
        """As `add`, for a `response_row`."""
        row = {**row, "elapsed": elapsed}
        begin = self._write(row)
        if begin is not None:
            self._found(row, begin)

    def elapsed(self, mode: str) -> float:
        """Seconds of decoding in a mode, up to its last response."""
        return self._elapsed.get(mode, 0)

    def rollout(
        self, key: Key, prompt: list[int], settings: GenerationSettings, codec: Codec, length: int
    ) -> Rollout:
        """A response that is there, as it was decoded, but for the log-probabilities.

        Args:
            length: of the context of the model.

        Raises:
            LogError: the prompt is another one, or the line is damaged.
        """
        begin = self.rows[key]
        try:
            with self.path.open("rb") as file:  # the other holds what a full disk did not take
                file.seek(begin)
                row = json.loads(file.readline())
            weaver = settings.weaver(prompt, codec, length)
            recorded = {tuple(id): (reason, tokens) for id, reason, tokens in row["completions"]}
            completions = {}
            while not weaver.done:
                request = weaver.requests()[0]
                reason, tokens = recorded[request.id]
                weaver.complete(request, tokens, reason)
                completions[request.id] = Completion(
                    request.id, request.context, tokens, [], [], reason
                )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise LogError(
                f"{self.path}: the response to problem {key.problem + 1}, sample {key.sample + 1} "
                "cannot be made again; delete the file, or start afresh with --overwrite"
            ) from error
        return Rollout(
            prompt,
            weaver.response,
            [completions[id] for id in sorted(completions)],
            weaver.limits,
            row["decode_steps"],
            row["seconds"],
        )

    def close(self, *, remove: bool) -> None:
        """Ends the log; with `remove` the file too, as when all that it was for is written."""
        if remove:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # on a full disk
            self._file.close()

    def _write(self, row: Mapping[str, Any]) -> int | None:
        """Returns where its line begins in the file; None: it is not there."""
        if self._failed:
            return None
        try:
            begin = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            return begin
        except OSError as error:
            self._failed = True
            print(
                f"warning: {self.path}: {error.strerror}: it keeps no more responses, and what "
                "comes from here on is lost if the command is stopped",
                file=sys.stderr,
                flush=True,
            )
        return None


def response_row(key: Key, rollout: Rollout, text: str) -> dict[str, Any]:
    """A response as it stands in a log, as JSON has it, but for the time."""
    return {
        "key": key,
        "response": text,
        "decode_steps": rollout.decode_steps,
        "seconds": rollout.seconds,
        "completions": [[c.request, c.reason, c.tokens] for c in rollout.completions],
    }


def partial_of(target: Path) -> Path:
    """Where the responses stand until `target` is written."""
    return target.with_name(f"{target.name}.partial")


def difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first setting that differs, in words; None: none does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *found)):
            inner = f"{name}.{key}".lstrip(".")
            if words := difference(found.get(key), wanted.get(key), inner):
                return words
        return None
    if found == wanted:
        return None
    return f"{name} {_shown(found)}, not {_shown(wanted)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
