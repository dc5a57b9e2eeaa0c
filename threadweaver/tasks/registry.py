"""Tasks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from threadweaver.tasks.data_file import DataFile
from threadweaver.tasks.multiplication import Multiplication
from threadweaver.tasks.reasoning_gym import ReasoningGym, dataset_names
from threadweaver.tasks.task import Task


def load_task(name: str, **options: Any) -> Task:
    """The task called `name`, with its options.

    Args:
        name: `multiplication`, `reasoning_gym:<dataset>`, or the path of a data file (.jsonl,
            .json, .parquet).
        options: those of `Multiplication`, `ReasoningGym` or `DataFile`.

    Raises:
        ValueError: no such task, file or option, an option out of range, or a package is not
            installed; says in one line which, and what there is instead.
    """
    family, _, dataset = name.partition(":")
    make: Callable[..., Task]
    if Path(name).suffix in (".jsonl", ".json", ".parquet"):
        make = partial(DataFile, name)
    elif name == "multiplication":
        make = Multiplication
    elif family == "reasoning_gym" and dataset in dataset_names():
        make = partial(ReasoningGym, dataset)
    else:
        raise ValueError(_unknown(name))
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known and "options" not in known:
            raise ValueError(f"{name} has no option '{option}'; it has {', '.join(known)}")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"{name}: an option has the wrong type: {error}") from error


def _unknown(name: str) -> str:
    try:
        datasets = dataset_names()
    except ValueError:
        datasets = []
    names = ["multiplication", *(f"reasoning_gym:{dataset}" for dataset in datasets)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return (
        f"no task '{name}'{hint}: there are multiplication, reasoning_gym:<dataset> and data files "
        "(.jsonl, .json, .parquet)"
    )
