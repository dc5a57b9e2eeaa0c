"""One HTML file out of a template, a style, a script and data.

Python only fills in data, as JSON in <script type="application/json">, and text in the title. What
is shown of it the script sets as text, never as markup. The page's own policy (CSP) lets it load
nothing, and run no script but the one that it was written with.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from threadweaver.command import check_overwrite, is_writable

GENERATOR = '<meta name="generator" content="threadweaver.view">'
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def build_page(name: str, title: str, data: Mapping[str, str]) -> str:
    """The text of a page.

    Args:
        name: of the template, pages/NAME.html with .css and .js.
        title: of the window.
        data: by name, as `as_json` makes it; `read` of page.js gives it to the script.
    """
    style = _template("page.css") + _template(f"{name}.css")
    script = _template("page.js") + _template(f"{name}.js")
    parts = {
        "generator": GENERATOR,
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        "title": _sound(html.escape(title)),
        "style": style,
        "body": _template(f"{name}.html"),
        "data": "\n".join(_data_elements(data)),
        "script": script,
    }
    # One pass, so that nothing that was filled in is taken for a placeholder.
    return _PLACEHOLDER.sub(lambda found: parts[found[1]], _template("page.html"))


def as_json(value: Any) -> str:
    """JSON that may stand in a <script>: no tag can begin in it, and UTF-8 can hold it.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def packed(numbers: Any) -> str:
    """Whole numbers as base64 of little-endian int32, for `ints` of page.js."""
    return base64.b64encode(np.ascontiguousarray(numbers, "<i4").tobytes()).decode()


def check_out(path: Path, overwrite: bool) -> None:
    """Asks before anything but a page is overwritten.

    Raises:
        ValueError: the page cannot be written there, or must not be.
    """
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"out: {path.parent}: no such folder; make it, or name another")
    if not is_writable(path) or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: {path} cannot be written; name another file")
    if not _is_page(path):
        check_overwrite([path], overwrite)


def _is_page(path: Path) -> bool:
    """Whether a file is a page that `build_page` made."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(500)


def _data_elements(data: Mapping[str, str]) -> Iterable[str]:
    for name, text in data.items():
        yield f'<script type="application/json" id="data-{name}">{text}</script>'


def _template(name: str) -> str:
    return (files("threadweaver.view") / "pages" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sound(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)
