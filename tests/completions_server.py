"""A completions server around transformers' `generate`, greedy, for tests of those who ask it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from threadweaver.model import load_model
from threadweaver.trajectory import Codec


@dataclass
class Fault:
    """What a server does instead of what it should, for so many completions."""

    status: int = 200
    body: bytes | None = None
    seconds: float = 0.0
    times: int = 1_000_000


@dataclass
class CompletionsServer:
    """A server that runs.

    Attributes:
        dialect: the best form that it knows; ids in and out, or text alone.
        asked: the bodies of all completions that it was asked for.
        most_at_once: of these, at the same time.
        after: how many completions are as they should be before the fault.
    """

    url: str
    model: Any
    codec: Codec
    dialect: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    fault: Fault | None = None
    after: int = 0
    names: tuple[str, ...] = ("tiny",)
    seconds: float = 0.0
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.asked.append(body)
            faulty = self.fault if len(self.asked) > self.after else None
            if faulty:
                faulty.times -= 1
                self.fault = faulty if faulty.times else None
        try:
            time.sleep(self.seconds + (faulty.seconds if faulty else 0))
            if faulty and (faulty.status != 200 or faulty.body is not None):
                return faulty.status, faulty.body or b'{"error": {"message": "I fail"}}'
            return self._answer(path, body)
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            if self.dialect != "generate":
                return 404, {"message": "Not Found"}
            sampling = body["sampling_params"]
            ids = self._decode(body["input_ids"], sampling["max_new_tokens"], sampling)
            stop = sampling["stop_token_ids"]
            ended = bool(ids) and ids[-1] in stop
            finish = {"type": "stop", "matched": ids[-1]} if ended else {"type": "length"}
            meta = {"finish_reason": finish}
            return 200, {"text": self.codec.decode(ids), "output_ids": ids, "meta_info": meta}
        prompt = body["prompt"]
        if isinstance(prompt, str) is not (self.dialect == "text"):
            return 400, {"message": "prompt: not of this form"}
        if self.dialect == "text":
            body = {**body, "stop_token_ids": [self.codec.encode(s)[0] for s in body["stop"]]}
            prompt = self.codec.encode(prompt)
        ids = self._decode(prompt, body["max_tokens"], body)
        ended = bool(ids) and ids[-1] in body["stop_token_ids"]
        shown = ids[:-1] if ended and self.dialect == "text" else ids
        choice: dict[str, Any] = {
            "text": self.codec.decode(shown),
            "finish_reason": "stop" if ended else "length",
        }
        if self.dialect == "token_ids" and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if self.dialect == "logprobs" and body.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{id}" for id in ids]}
        return 200, {"choices": [choice]}

    def _decode(self, prompt: list[int], most: int, sampling: dict[str, Any]) -> list[int]:
        assert sampling["temperature"] == 0
        with self._lock, torch.no_grad():
            out = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=most,
                eos_token_id=sampling["stop_token_ids"] or None,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()


@contextmanager
def serve(folder: str | Path, dialect: str) -> Iterator[CompletionsServer]:
    """Runs a server of a model with tags on a port of this machine until the block ends."""
    model, tokenizer = load_model(folder)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = [{"id": name, "max_model_len": 1024} for name in running.names]
            self._send(200, {"object": "list", "data": found})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*running.answer(self.path, body))

        def _send(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # who asked is gone

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # no thread is left when torch ends
    url = f"http://127.0.0.1:{server.server_port}"
    running = CompletionsServer(url, model, Codec.from_tokenizer(tokenizer), dialect)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
