"""A completions server by its address: what it offers, and requests to it over HTTP."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MOST_SHOWN = 200  # characters of what a server says


class ServerError(Exception):
    """A server that cannot be used or fails; says in one line what it did.

    Attributes:
        status: the HTTP status if it refused a request.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def check_url(setting: str, url: str) -> None:
    """Raises ValueError, with the name of the setting, for what is no address of a server."""
    reason = "give its address, such as http://localhost:8000"
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", url):
            _ = parts.port  # raises if it is none
            return
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{setting} is {url[:MOST_SHOWN]!r}: {reason}")


def open_client(setting: str, url: str, timeout: float, retries: int) -> AsyncOpenAI:
    """A client of the package `openai`; the key is read from OPENAI_API_KEY.

    Args:
        setting: that a message names.

    Raises:
        ValueError: the package is missing, or the key or the address is none.
    """
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ValueError(
            f"{setting}: this needs the package 'openai': pip install 'threadweaver[annotate]'"
        ) from error
    # Servers of one's own mostly ask for none, and the package does not go without.
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("OPENAI_API_KEY: is no key: it holds white space or other than ASCII")
    try:
        return AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
    except Exception as error:  # whatever it finds wrong with the address
        raise ValueError(f"{setting}: {url}: {error}") from error


@dataclass(frozen=True)
class ServerSettings:
    """Where a server is and how long it is waited for.

    Args:
        url: of an OpenAI-compatible server, with or without /v1. Its key, if it needs one, is in
            the environment variable OPENAI_API_KEY.
        model: as the server calls it; may be left out if it offers one alone.
        timeout: seconds until a request is given up.
        retries: how often a request that failed or was given up is sent again.

    Raises:
        ValueError: a setting out of range; names it.
    """

    url: str
    model: str | None = None
    timeout: float = 600.0
    retries: int = 2

    def __post_init__(self) -> None:
        check_url("server", self.url)
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"server_timeout is {self.timeout}: it must be above 0 and finite")
        if not 0 <= self.retries <= 1000:
            raise ValueError(f"server_retries is {self.retries}: it must be from 0 to 1000")

    @property
    def root(self) -> str:
        """The address without /v1."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")


class Connection:
    """Requests to a server, in one event loop."""

    def __init__(self, client: AsyncOpenAI, root: str):
        self._client, self._root = client, root

    async def get(self, path: str) -> dict[str, Any]:
        return await self._send(path, self._client.get(path, cast_to=object))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises ServerError for a server that cannot be reached, refuses, fails for as many times
        as it is asked, does not answer in time, or answers what is no JSON object."""
        return await self._send(path, self._client.post(path, cast_to=object, body=body))

    async def _send(self, path: str, sent: Any) -> dict[str, Any]:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        where = f"server {self._root}{path}"
        try:
            found = await sent
        except APITimeoutError as error:
            raise ServerError(f"{where}: no answer in time (server_timeout)") from error
        except APIConnectionError as error:
            reason = error.__cause__ or error
            raise ServerError(f"{where}: cannot be reached: {_shown(reason)}") from error
        except APIStatusError as error:
            raise ServerError(
                f"{where}: answers {error.status_code}: {_shown(error.message)}", error.status_code
            ) from error
        except (OpenAIError, ValueError) as error:
            raise ServerError(f"{where}: answers what is no JSON: {_shown(error)}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{where}: answers no JSON object: {_shown(found)}")
        return found


@asynccontextmanager
async def connection(settings: ServerSettings) -> AsyncIterator[Connection]:
    """Requests to the server, within the event loop that it is entered in.

    Raises:
        ValueError: as `open_client`.
    """
    client = open_client("server", settings.root, settings.timeout, settings.retries)
    async with client:
        yield Connection(client, settings.root)


@dataclass(frozen=True)
class Offer:
    """The model that a server is to run.

    Attributes:
        context_length: most tokens of a prompt and its response, if the server says so.
    """

    model: str
    context_length: int | None


async def find_model(server: Connection, name: str | None) -> Offer:
    """The model of that name, or the only one.

    Raises:
        ServerError: as `Connection.get`; the server offers no model of that name, or several and
            none is named.
    """
    listed = (await server.get("/v1/models")).get("data")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ServerError("server: /v1/models lists no models: is it OpenAI-compatible?")
    models = {str(one.get("id")): one.get("max_model_len") for one in listed}
    names = ", ".join(models) or "none"
    if name is None and len(models) != 1:
        raise ServerError(f"server_model: name one of the server's models: {names}")
    chosen = next(iter(models)) if name is None else name
    if chosen not in models:
        raise ServerError(f"server_model: the server has no model {chosen!r}: it offers {names}")
    length = models[chosen]
    return Offer(chosen, length if isinstance(length, int) and length > 0 else None)


def _shown(what: object) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
