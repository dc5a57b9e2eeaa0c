"""The client of a server: what it repeats, what it gives up, what it takes for a reply."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.annotate.stub import Fault, StubServer
from threadweaver.annotate.failures import NoReply, Refused
from threadweaver.annotate.openai_teacher import OpenAITeacher
from threadweaver.annotate.settings import TeacherSettings
from threadweaver.annotate.teacher import Reply

pytest.importorskip("openai")
ASKED = [{"role": "user", "content": "How?"}]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr("threadweaver.annotate.openai_teacher.FIRST_WAIT", 0.001)


def ask(
    *replies: str | Fault,
    retries: int = 3,
    timeout: float = 5.0,
    sent: list | None = None,
    **settings,
) -> Reply:
    """The reply of a server that answers with these, one after the other.

    Args:
        sent: gets the requests.
    """
    answers = iter(replies)

    async def once(url: str) -> Reply:
        given = TeacherSettings(url=url, model="stub", retries=retries, timeout=timeout, **settings)
        teacher = OpenAITeacher(given)
        try:
            return await teacher.ask(ASKED, lambda text: None, 0)
        finally:
            await teacher.close()

    with StubServer(lambda messages: next(answers)) as server:
        reply = asyncio.run(once(server.url))
        if sent is not None:
            sent += server.requests
        return reply


def test_a_reply_and_its_tokens():
    assert ask("So.") == Reply("So.", "stop", 100, 10, 0)


def test_the_thinking_of_the_teacher_is_no_part_of_its_reply():
    assert ask("<think>\nHm. 1 [1-2]\n</think>\n\nSo.\n").text == "So."


NO_REPLIES = [
    *(Fault(429), Fault(500), Fault(503), Fault(408)),
    *(Fault(body=b"<html>Bad gateway"), Fault(body=b""), Fault(body=b"[]"), Fault(body=b"{}")),
    *(Fault(body=b'{"choices": []}'), Fault(body=b'{"choices": [{"message": null}]}')),
    *(Fault(body=b"[" * 100_000), Fault(body=b'{"choices": [{"message": {"content": 3}}]}')),
]


def test_errors_and_nonsense_are_repeated_and_counted():
    found = ask(*NO_REPLIES, "So.", retries=len(NO_REPLIES))
    assert found == Reply("So.", "stop", 100, 10, len(NO_REPLIES))


@pytest.mark.parametrize("fault", [NO_REPLIES[1], NO_REPLIES[4]], ids=["error", "nonsense"])
def test_a_request_is_given_up_in_the_end(fault):
    with pytest.raises(NoReply):
        ask(fault, fault, retries=1)


def test_a_request_that_hangs_is_repeated():
    assert ask(Fault(seconds=20.0), "So.", timeout=2.0).retries == 1


def test_a_server_that_is_not_there_gives_no_reply():
    async def once() -> None:
        settings = TeacherSettings(url="http://127.0.0.1:9/v1", model="stub", retries=0)
        await OpenAITeacher(settings).ask(ASKED, lambda text: None, 0)

    with pytest.raises(NoReply, match=r"[Cc]onnection"):
        asyncio.run(once())


@pytest.mark.parametrize(
    ("fault", "finish"),
    [
        (Fault(text="I won't.", refusal="I won't."), "refusal"),
        (Fault(text="Half a", finish="length"), "length"),
        (Fault(text="x", finish="content_filter"), "refusal"),
        (Fault(text=None), "refusal"),
        (Fault(text="<think>Hm.</think>"), "refusal"),
        (Fault(text="half \ud800"), "stop"),
    ],
)
def test_how_a_reply_ended(fault, finish):
    reply = ask(fault)
    assert reply.finish == finish
    reply.text.encode()


def test_a_request_that_is_too_long_is_refused_and_not_repeated():
    with pytest.raises(Refused, match="too long"):
        ask(Fault(400, b'{"error": {"message": "too long"}}'))


@pytest.mark.parametrize(
    ("status", "says"), [(401, "OPENAI_API_KEY"), (402, "to be paid"), (404, "teacher.model")]
)
def test_a_server_that_cannot_be_used_at_all(status, says):
    with pytest.raises(ValueError, match=says):
        ask(Fault(status, b'{"error": {"message": "no"}}'))


def test_settings_reach_the_server():
    extra = {"reasoning_effort": "low"}
    sent = []
    ask("So.", temperature=0.5, max_tokens=7, extra=extra, sent=sent)
    known = {"model": "stub", "messages": ASKED, "temperature": 0.5, "max_tokens": 7}
    assert sent == [known | extra]


@pytest.mark.parametrize("key", ["ключ", "two words", "a\nb"])
def test_a_key_that_is_none_is_refused_before_any_request(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: is no key"):
        OpenAITeacher(TeacherSettings(url="http://127.0.0.1:9/v1", model="stub"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"threadweaver\[annotate\]"):
        OpenAITeacher(TeacherSettings(url="http://localhost/v1", model="stub"))
