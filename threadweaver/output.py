"""Output: what a terminal may be given, and what nobody takes, since the reader of a pipe is gone,
a terminal was closed, a disk is full."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any

# Unicode's pictures of control characters; it has none of those from U+0080 on.
_PICTURES = {
    **{i: 0x2400 + i for i in range(0x20) if chr(i) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def visible(text: str) -> str:
    """Text that others wrote (a model, a server, a file), fit for a terminal: control characters
    but newlines and tabs are commands to it, and become pictures of them."""
    return text.translate(_PICTURES)


def drop(stream: IO[str]) -> None:
    """Sends what is still written to a stream nowhere, so that no error follows at the end."""
    with suppress(OSError, ValueError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Output:
    """A stream for work that goes on when nobody takes what it writes any more.

    Attributes:
        is_broken_pipe: whether the reader of a pipe is gone.
    """

    is_broken_pipe = False

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        self.is_broken_pipe = self.is_broken_pipe or isinstance(error, BrokenPipeError)
        drop(self._stream)
