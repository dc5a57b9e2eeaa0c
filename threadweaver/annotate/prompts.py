"""What the teacher is asked: a text file for each kind of request, with {{places}} to fill in."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# The places of each file: all of them, and no others.
PLACES = {
    "map": {"problem", "lines", "last_line"},
    "independent": {"problem", "before", "forbidden", "thread"},
    "outline": {"problem", "before", "threads", "count"},
    "again": {"breach"},
}
BUILT_IN = Path(__file__).parent / "prompts"

_PLACE = re.compile(r"\{\{([^{}\n]*)\}\}")


class Prompts:
    """The texts by name.

    Args:
        folder: files in it (map.md, ...) stand in for the built-in ones of the same name.

    Raises:
        ValueError: no such folder, or a file that cannot be used; names it.
    """

    def __init__(self, folder: Path | None = None):
        files = {name: BUILT_IN / f"{name}.md" for name in PLACES}
        if folder is not None:
            if not folder.is_dir():
                raise ValueError(f"prompts: {folder} is no folder")
            own = sorted(folder.glob("*.md"))
            names = ", ".join(f"{name}.md" for name in PLACES)
            if not own:
                raise ValueError(f"prompts: {folder} holds none of {names}")
            for path in own:
                if path.stem not in PLACES:
                    raise ValueError(f"{path}: no such prompt; there are {names}")
                files[path.stem] = path
        self._texts = {name: _read(path, PLACES[name]) for name, path in files.items()}

    def fill(self, name: str, **places: object) -> str:
        """The text of a file with its places filled in."""
        return _PLACE.sub(lambda place: str(places[place[1].strip()]), self._texts[name])

    @property
    def digest(self) -> str:
        """Of all texts: other prompts, other digest."""
        return hashlib.sha256(repr(self._texts).encode()).hexdigest()


def _read(path: Path, places: set[str]) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"{path}: cannot be read: {reason}") from error
    found = {place.strip() for place in _PLACE.findall(text)}
    has = ", ".join(f"{{{{{place}}}}}" for place in sorted(places))
    if unknown := sorted(found - places):
        raise ValueError(f"{path}: unknown place {{{{{unknown[0][:60]}}}}}; it has {has}")
    if missing := sorted(places - found):
        raise ValueError(f"{path}: the place {{{{{missing[0]}}}}} is missing; it has {has}")
    return text.strip()
