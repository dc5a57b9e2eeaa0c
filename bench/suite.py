"""What a benchmark suite is made of, and which suites there are.

A suite yields setups (one case with its inputs) and lists its peers (implementations to compare).
Every peer is prepared, checked and timed on every setup: bench/measure.py.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from jsonargparse import ArgumentParser

from bench.record import Row
from bench.roofline import Work

# Suite -> its module, which is imported only when the suite is asked for.
SUITES = {
    "layout": "bench.layout",
    "attention": "bench.attention",
    "candidates": "bench.candidates",
    "decode": "bench.decode",
    "rollout": "bench.rollout",
    "engine": "bench.engine",
    "train_step": "bench.train_step",
    "model_step": "bench.model_step",
}
QUICK_HELP = "few small cases and few repeats, to see that everything works"
ONLY_HELP = (
    "run only rows that match, e.g. --only 'case=star*' 'peer=ours*'; keys as in the table's title,"
    " and peer; several globs of one key are alternatives"
)


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by a peer that does not support this setup; the message is the reason."""


class UsageError(ValueError):
    """Options that cannot be met; the message names the option."""


class Setup(ABC):
    """One case with its inputs, shared by all peers of one comparison.

    Attributes:
        input_sets: the number of sets of inputs; successive calls take them in turn.
    """

    input_sets = 1

    @property
    @abstractmethod
    def key(self) -> Row:
        """What identifies the comparison: case, dtype, pass, ... Cheap: filters read it first."""

    @abstractmethod
    def check(self, peer: str, result: Any, inputs: int) -> str | None:
        """None if a peer's result on this set of inputs is right, else what is wrong with it."""

    def work(self, peer: str) -> Work:
        """The operations and bytes that one call of this peer is credited with."""
        return Work()

    def figures(self, peer: str, seconds: float) -> Row:
        """Further entries of the row of a peer whose call took `seconds`."""
        return {}

    def close(self) -> None:  # noqa: B027 - most setups hold nothing to release
        """Releases what outlives the object, such as threads."""


S = TypeVar("S", bound=Setup)


@dataclass(frozen=True)
class Peer(Generic[S]):
    """One implementation to time.

    Attributes:
        prepare: returns the call to time, a function of the number of the set of inputs. What
            `prepare` does itself is not timed. Raises Skip if the peer does not support the setup.
        why_absent: why the peer cannot run at all on a device ("cpu" or "cuda") here, or None.
            Imports no more than it must.
    """

    name: str
    prepare: Callable[[S], Callable[[int], Any]]
    ours: bool = False
    why_absent: Callable[[str], str | None] = lambda device: None


@dataclass
class Options:
    """Options of every benchmark.

    Args:
        device: where to run.
        quick, only: see QUICK_HELP and ONLY_HELP.
        json: write {"env": ..., "rows": [...]} to this file; rewritten after every case.
        without: leave out the cases of these result files, of a run that was cut.
        budget: seconds of timing per row. Default: 2, or 0.1 with --quick.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False
    json: Path | None = None
    without: list[Path] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    budget: float | None = None


def at_least_one(options: Options, *names: str) -> None:
    """Raises UsageError if one of these options is given and less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}: it must be at least 1")


O = TypeVar("O", bound=Options)  # noqa: E741 - the options type beside S, the setup type


@dataclass(frozen=True)
class Suite(Generic[O, S]):
    """A benchmark: what it runs on, what it compares, and what its table shows.

    Attributes:
        setups: the setups for these options; large things in them are built when first used.
        columns: row key -> heading; a float is shown to three digits.
        versus: peer -> heading of the column that shows the ratio to it.
        relate: adds entries that follow from several rows of one setup, given the rows that are ok
            by peer.
    """

    name: str
    options: type[O]
    setups: Callable[[O], Iterable[S]]
    peers: Sequence[Peer[S]]
    columns: dict[str, str] = field(default_factory=dict)
    versus: dict[str, str] = field(default_factory=dict)
    relate: Callable[[dict[str, Row]], None] = lambda rows: None

    def parser(self, prog: str) -> ArgumentParser:
        """The parser of a command line whose arguments are the suite's options."""
        parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
        parser.add_argument("--only", nargs="+", default=[], metavar="KEY=GLOB", help=ONLY_HELP)
        parser.add_class_arguments(self.options, skip={"quick", "only"})
        return parser


def load_suite(name: str) -> Suite[Any, Any]:
    """The suite of a name in SUITES."""
    return importlib.import_module(SUITES[name]).SUITE
