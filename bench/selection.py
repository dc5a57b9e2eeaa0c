"""Which setups and peers of a suite a run takes: the option --only, and what can run here."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch

from bench.record import RecordError, read_record
from bench.suite import O, Peer, Row, S, Suite, UsageError


class Only:
    """The filters of --only: KEY=GLOB. Globs of one key are alternatives; all keys must match."""

    def __init__(self, texts: Sequence[str]):
        self.globs: dict[str, list[str]] = {}
        for text in texts:
            key, equals, glob = text.partition("=")
            if not equals:
                raise UsageError(f"--only: {text!r} is not of the form KEY=GLOB")
            self.globs.setdefault(key, []).append(glob)

    def admits(self, row: Row) -> bool:
        """Whether every key that the row has matches."""
        return all(
            any(fnmatch.fnmatchcase(str(row[key]), glob) for glob in globs)
            for key, globs in self.globs.items()
            if key in row
        )


@dataclass(frozen=True)
class Selection(Generic[S]):
    """The part of a suite to run.

    Attributes:
        setups: a run removes each as it comes to it, so that its inputs are freed after it. None
            where --without has all of them.
        absent: peer -> why it cannot run here.
    """

    setups: list[S]
    peers: list[Peer[S]]
    absent: dict[str, str]


def check_device(device: str) -> None:
    """Raises UsageError if the device is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")


def check_folder(json: Path | None) -> None:
    """Raises UsageError if there is no folder for this file, or it is a folder itself."""
    if json and not json.parent.is_dir():
        raise UsageError(f"--json: there is no folder {json.parent}")
    if json and json.is_dir():
        raise UsageError(f"--json: {json} is a folder: name a file in it")


def select(suite: Suite[O, S], options: O) -> Selection[S]:
    """Raises UsageError where the options cannot be met or leave nothing; says which option."""
    check_device(options.device)
    check_folder(options.json)
    if options.budget is not None and options.budget <= 0:
        raise UsageError(f"--budget is {options.budget:g}: it must be more than 0")
    only = Only(options.only)
    setups = list(suite.setups(options))
    keys = {"peer", *setups[0].key}
    if unknown := sorted(set(only.globs) - keys):
        raise UsageError(
            f"--only: {suite.name} has no key {unknown[0]!r}; one of {', '.join(sorted(keys))}"
        )
    setups = [setup for setup in setups if only.admits(setup.key)]
    peers = [peer for peer in suite.peers if only.admits({"peer": peer.name})]
    if not setups or not peers:
        raise UsageError(f"--only {' '.join(options.only)}: nothing in {suite.name} matches")
    try:
        done = [row for path in options.without for row in read_record(path).rows]
    except RecordError as error:
        raise UsageError(f"--without: {error}") from error
    setups = [s for s in setups if not any(s.key.items() <= row.items() for row in done)]
    absent = {p.name: why for p in peers if (why := p.why_absent(options.device))}
    peers = [peer for peer in peers if peer.name not in absent]
    if not peers:
        whys = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise UsageError(f"--only {' '.join(options.only)}: no such peer is here: {whys}")
    return Selection(setups, peers, absent)
