"""Tasks by name: the built-in ones, and those that installed packages register as entry points."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from threadweaver.data import is_data_path
from threadweaver.tasks.benchmarks import BENCHMARKS, Benchmark
from threadweaver.tasks.data_file import DataFile
from threadweaver.tasks.multiplication import Multiplication
from threadweaver.tasks.reasoning_gym import ReasoningGym, dataset_names
from threadweaver.tasks.task import Task

# A package adds a task by an entry point of this group: its name, and a function or class that
# takes the task's options and returns a Task.
GROUP = "threadweaver.tasks"


def load_task(name: str, **options: Any) -> Task:
    """The task called `name`, with its options.

    Args:
        name: `multiplication`, `reasoning_gym:<dataset>`, a benchmark (`aime24`), the path of a
            data file (.jsonl, .json, .parquet), a folder or a pattern of such files, or the name of
            an entry point of the group `threadweaver.tasks`.
        options: those of `Multiplication`, `ReasoningGym`, `Benchmark`, `DataFile` or the entry
            point's.

    Raises:
        ValueError: no such task, file or option, an option out of range, a package is not
            installed, or an entry point is broken; says in one line which, and what there is
            instead.
    """
    family, _, dataset = name.partition(":")
    make: Callable[..., Task]
    if is_data_path(name):
        make = partial(DataFile, name)
    elif name == "multiplication":
        make = Multiplication
    elif family == "reasoning_gym" and dataset in dataset_names():
        make = partial(ReasoningGym, dataset)
    elif name in BENCHMARKS:
        make = partial(Benchmark, name)
    elif found := tuple(entry_points(group=GROUP, name=name)):
        make = _factory(found[0])
    else:
        raise ValueError(_unknown(name))
    parameters = inspect.signature(make).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                known = ", ".join(parameters) or "none"
                raise ValueError(f"{name} has no option '{option}'; it has {known}")
    for option, value in options.items():
        if option in parameters:
            _check_type(f"{name}: option '{option}'", value, parameters[option].annotation)
    try:
        task = make(**options)
    except TypeError as error:
        raise ValueError(f"{name}: an option has the wrong type: {error}") from error
    parts = ("ungraded", "problems", "is_correct", "demonstration")
    if missing := [part for part in parts if not hasattr(task, part)]:
        raise ValueError(f"{name}: {type(task).__name__} is no task: it lacks {', '.join(missing)}")
    return task


def _check_type(what: str, value: Any, annotation: Any) -> None:
    """Raises ValueError for a value of another type than a plain one that is annotated."""
    kinds = {"int": int, "float": int | float, "bool": bool, "str": str}
    kind = kinds.get(getattr(annotation, "__name__", annotation))
    is_number_as_bool = isinstance(value, bool) and kind is not bool
    if kind is not None and (not isinstance(value, kind) or is_number_as_bool):
        name = getattr(annotation, "__name__", annotation)
        raise ValueError(f"{what} is {str(value)[:60]!r}: it must be of type {name}")


def task_names() -> str:
    """What `load_task` takes here, for messages."""
    names = ", ".join(("multiplication", "reasoning_gym:<dataset>", *BENCHMARKS, *_installed()))
    return f"{names} and data files (.jsonl, .json, .parquet)"


def _installed() -> list[str]:
    return sorted(entry_points(group=GROUP).names)


def _factory(entry: EntryPoint) -> Callable[..., Task]:
    """The object that an entry point names. Raises ValueError, which names it, if that fails."""
    try:
        make = entry.load()
        inspect.signature(make)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"task '{entry.name}': its entry point {entry.value} cannot be loaded: {reason}"
        ) from error
    return make


def _unknown(name: str) -> str:
    try:
        datasets = dataset_names()
    except ValueError:
        datasets = []
    gym = (f"reasoning_gym:{dataset}" for dataset in datasets)
    names = ["multiplication", *gym, *BENCHMARKS, *_installed()]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"no task '{name}'{hint}: there are {task_names()}"
