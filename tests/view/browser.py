"""A headless Chromium, and what a page holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox refuses to run as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, ready.

    Attributes:
        view: playwright's page.
        loaded: addresses of all that it loaded.
        errors: of its script, and what its policy refused.
    """

    def __init__(self, browser: Any, path: Path, scheme: str = "light", hash: str = ""):
        self.view = browser.new_page(
            viewport={"width": 1360, "height": 900}, color_scheme=scheme, device_scale_factor=1
        )
        self.loaded: list[str] = []
        self.errors: list[str] = []
        self.view.on("request", lambda request: self.loaded.append(request.url))
        self.view.on("pageerror", lambda error: self.errors.append(str(error)))
        self.view.on("console", lambda line: self.errors.append(line.text))
        self.view.goto(f"{path.as_uri()}{hash}")
        self.view.wait_for_selector("html[data-ready]", state="attached")

    @property
    def seconds_to_open(self) -> float:
        return float(self.view.get_attribute("html", "data-ready")) / 1000

    def close(self) -> None:
        """Checks what holds for every page: it loaded itself alone, and nothing failed."""
        assert set(self.loaded) == {self.view.url.partition("#")[0]}
        assert self.errors == []
        self.view.close()


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.data: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._name: str | None = None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._name = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self._name:
            self.data[self._name] = self.data.get(self._name, "") + data

    def handle_endtag(self, tag):
        self._name = None


def data_of(text: str) -> dict[str, Any]:
    """The data of a page by name, read as a browser parses it."""
    elements = _Elements()
    elements.feed(text)
    return {name.removeprefix("data-"): json.loads(held) for name, held in elements.data.items()}


def tags_of(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every tag of a page, with its attributes."""
    elements = _Elements()
    elements.feed(text)
    return elements.tags
