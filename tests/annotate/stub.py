"""An OpenAI-compatible server in a thread, which answers as it is told and counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from examples.annotate.stub_teacher import answer

Messages = list[dict[str, str]]


@dataclass
class Fault:
    """An answer that is no usable reply.

    Attributes:
        body: of the answer; None: a completion with `text`.
        seconds: before it comes.
    """

    status: int = 200
    body: bytes | None = None
    text: str | None = ""
    finish: str = "stop"
    refusal: str | None = None
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=lambda: {"retry-after-ms": "1"})


def right(messages: Messages) -> str | Fault:
    return answer(messages[0]["content"])


class StubServer:
    """Args:
    reply: to messages; called in the order of the requests, one at a time.

    Attributes:
        received: the messages of all requests.
        answered: those whose reply is on its way.
        before_reply: called with the messages when a reply is about to be sent; whether it is to.
    """

    def __init__(self, reply: Callable[[Messages], str | Fault] = right):
        self.reply = reply
        self.received: list[Messages] = []
        self.requests: list[dict[str, Any]] = []
        self.answered: list[Messages] = []
        self.before_reply: Callable[[Messages], bool] = lambda messages: True
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                messages = request["messages"]
                with stub.lock:
                    stub.received.append(messages)
                    stub.requests.append(request)
                    reply = stub.reply(messages)
                fault = reply if isinstance(reply, Fault) else Fault(text=reply)
                if fault.seconds:
                    time.sleep(fault.seconds)
                with stub.lock:
                    if not stub.before_reply(messages):
                        return
                    stub.answered.append(messages)
                content = completion(fault) if fault.body is None else fault.body
                try:
                    self.send_response(fault.status)
                    for name, value in fault.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client is gone

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(fault: Fault) -> bytes:
    message = {"role": "assistant", "content": fault.text, "refusal": fault.refusal}
    choice = {"index": 0, "finish_reason": fault.finish, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub"}
    return json.dumps({**body, "choices": [choice], "usage": usage}).encode()
