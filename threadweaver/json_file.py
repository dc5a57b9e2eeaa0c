"""JSON files that hold one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a file, which has at least these keys.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, holds something else, or lacks a
            key; none of them need name the file.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds {json.dumps(value)[:40]}, not a JSON object")
    for key in keys:
        if key not in value:
            raise ValueError(f"it has no '{key}'")
    return value
