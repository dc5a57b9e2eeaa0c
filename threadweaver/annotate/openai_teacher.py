"""A teacher behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from threadweaver.annotate.failures import NoReply, Refused
from threadweaver.annotate.form import Form
from threadweaver.annotate.settings import TeacherSettings
from threadweaver.annotate.teacher import Reply, reply_of
from threadweaver.generate.server.address import open_client
from threadweaver.trajectory import Message

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before a repetition, twice as long each time
# The package `openai` waits no longer than that where a server says when to come back.
LONGEST_RETRY_AFTER = 60.0


class OpenAITeacher:
    """See `Teacher`. The package `openai` repeats what failed on the way; a reply that is none is
    repeated here.

    Raises:
        ValueError: as `open_client`.
    """

    def __init__(self, settings: TeacherSettings):
        assert settings.url is not None
        self._settings = settings
        self._client = open_client("teacher.url", settings.url, settings.timeout, settings.retries)
        import openai

        self._openai = openai

    async def ask(self, messages: list[Message], form: Form, seed: int) -> Reply:
        """See `Teacher`."""
        settings, retries, wait = self._settings, 0, FIRST_WAIT
        body: dict[str, Any] = {"model": settings.model, "messages": messages}
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        # Of all attempts together: a server that sends a byte now and then never times out.
        most = (settings.retries + 1) * (settings.timeout + LONGEST_RETRY_AFTER)
        while True:
            try:
                async with asyncio.timeout(most):
                    raw = await self._client.chat.completions.with_raw_response.create(
                        **body, extra_body=settings.extra or None
                    )
                retries += raw.retries_taken
                return _reply(raw.http_response.content, retries)
            except _Nonsense as error:
                if retries >= settings.retries:
                    raise NoReply(str(error)) from error
            except TimeoutError as error:
                raise NoReply(f"no answer in {most:,.0f} s") from error
            except self._openai.APIError as error:
                raise self._failure(error) from error
            retries += 1
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def close(self) -> None:
        await self._client.close()

    def _failure(self, error: Exception) -> Exception:
        """What an error of the package means here; it has repeated what may be repeated."""
        status = getattr(error, "status_code", None)
        cause = error.__cause__ if isinstance(error, self._openai.APIConnectionError) else None
        said = " ".join(f"{error} {cause or ''}".split())[:300]
        if status in (401, 403):
            return ValueError(f"teacher.url: {said}: set OPENAI_API_KEY to a key of this server")
        if status == 402:
            return ValueError(
                f"teacher.url: {said}: the server wants to be paid; then run the same command "
                "again: every reply is saved"
            )
        if status == 404:
            return ValueError(f"teacher.url, teacher.model: {said}")
        if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
            return Refused(said)
        return NoReply(said)


class _Nonsense(ValueError):  # noqa: N818 (named for what was found)
    """An answer that is no chat completion."""


def _reply(content: bytes, retries: int) -> Reply:
    """The reply in the body of an answer. Raises _Nonsense if there is none."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        reason = choice.get("finish_reason")
        if not isinstance(text, str | None) or not all(isinstance(n, int) for n in counts):
            raise TypeError("a field has another type")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        begins = content[:80].decode(errors="replace")
        raise _Nonsense(f"the answer is no chat completion: {begins!r}") from error
    finish = "refusal" if refusal or reason == "content_filter" else "stop"
    return reply_of(
        text or "",
        "length" if reason == "length" else finish,
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        retries=retries,
    )
