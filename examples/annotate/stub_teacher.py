"""A stand-in for a teacher: an OpenAI-compatible server that knows the problems of problems.py.

    python examples/annotate/stub_teacher.py --port 8123

It finds its way by the words "First,", "Second," and "Together," at the start of lines. A real
teacher reads.
"""

import argparse
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(prompt: str) -> str:
    """The reply to a prompt of threadweaver.annotate."""
    if "The reasoning:\n" in prompt:
        return _map(prompt.rpartition("The reasoning:\n")[2])
    if "The part:\n" in prompt:
        found = re.search(r", in the same way as [a-z ]+,", prompt.rpartition("The part:\n")[2])
        return json.dumps([{"src": found[0], "dest": ","}] if found else [])
    count = len(re.findall(r"^Part [0-9]+:$", prompt.rpartition("the people then did")[2], re.M))
    names = ["the first", "the second", "the third", *("another",) * count]
    lines = (f"<Outline>{n}: Work out {names[n - 1]} amount</Outline>" for n in range(1, count + 1))
    return "\n".join(["<Outlines>", *lines, "</Outlines>"])


def _map(lines: str) -> str:
    starts = {
        word: int(number)
        for number, word in re.findall(r"^([0-9]+): (First|Second|Together),", lines, re.M)
    }
    last = lines.count("\n") + 1
    if len(starts) < 3:
        return f"1 [1-{last}] work: all of it"
    first, second, together = starts["First"], starts["Second"], starts["Together"]
    return "\n".join(
        [
            f"1 [1-{first - 1}] understand: what is asked",
            f"2 [{first}-{second - 1}] work: the first amount",
            f"3 [{second}-{together - 1}] work: the second amount",
            f"4 [{together}-{last}] work: the sum",
            "parallel 2 | 3",
        ]
    )


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        reply = answer(prompt)
        self.send({
            "id": "stub", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{
                "index": 0, "finish_reason": "stop",
                "message": {"role": "assistant", "content": reply},
            }],
            "usage": {
                "prompt_tokens": len(prompt) // 4, "completion_tokens": len(reply) // 4,
                "total_tokens": (len(prompt) + len(reply)) // 4,
            },
        })  # fmt: skip

    def send(self, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
