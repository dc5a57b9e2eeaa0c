"""Asking until a reply can be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.prompts import Prompts
from threadweaver.annotate.store import Log
from threadweaver.annotate.teacher import Reply
from threadweaver.trajectory import Message

TRIES = 3

T = TypeVar("T")


async def agree(
    log: Log, prompts: Prompts, prompt: str, grammar: str, read: Callable[[str], T]
) -> T:
    """What `read` makes of the first reply that it can use, out of at most TRIES. A reply that it
    cannot use is sent back with the breach.

    Raises:
        Breach: the last one.
        NoReply, Refused, ValueError: from the teacher.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}]
    for n in range(1, TRIES + 1):
        reply = await log.ask(messages, grammar)
        try:
            return _usable(reply, read)
        except Breach as breach:
            log.breach(breach)
            if n == TRIES:
                raise
            again = prompts.fill("again", breach=breach)
            if reply.text:
                answer: Message = {"role": "assistant", "content": reply.text}
                messages = [*messages, answer, {"role": "user", "content": again}]
            else:  # there is nothing to send back, and no turn may be empty
                last = f"{messages[-1]['content']}\n\n{again}"
                messages = [*messages[:-1], {"role": "user", "content": last}]
    raise AssertionError  # TRIES is at least 1


def _usable(reply: Reply, read: Callable[[str], T]) -> T:
    if reply.finish == "refusal":
        raise Breach("refused", "it is empty, or no answer to the request")
    if reply.finish == "length":
        raise Breach("cut off", "it was cut off before its end: be brief")
    return read(reply.text)
