"""A teacher: anything that answers chat requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from threadweaver.trajectory import Message

Finish = Literal["stop", "length", "refusal"]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: without the teacher's own thinking.
        finish: how it ended: by itself, by length, or by a refusal, as which an empty text counts.
        prompt_tokens, completion_tokens: as the teacher counts them; 0 if it does not.
        retries: how often the request was repeated because nothing usable came back.
    """

    text: str
    finish: Finish
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


def reply_of(text: str, finish: Finish, *, may_think: bool = True, **counts: int) -> Reply:
    """A reply, from the whole text of a response, which may begin with thinking."""
    if may_think:
        text = text.rpartition("</think>")[2]
    text = text.strip()
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
    return Reply(text, finish if text or finish == "length" else "refusal", **counts)


class Teacher(Protocol):
    """Many requests may be open at the same time."""

    async def ask(self, messages: list[Message], grammar: str, seed: int) -> Reply:
        """The reply to a conversation.

        Args:
            grammar: of the replies that can be read (threadweaver.annotate.grammar), which a
                teacher may be able to keep to.
            seed: of the draws, for a teacher that draws here.

        Raises:
            NoReply: it gave none.
            Refused: it does not take this request.
            ValueError: it cannot be used at all.
        """
        ...

    async def close(self) -> None: ...
