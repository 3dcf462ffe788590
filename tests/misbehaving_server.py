"""A server with OpenAI's chat completions API on localhost, which misbehaves as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: How a request is answered: ``good``, ``hang``, ``cut``, ``malformed``, a body, or a status with headers and a body.
#: ``headers`` and the body ``drip`` never end.
Answer = str | dict[str, Any] | tuple[int, Mapping[str, str], Any]


def completion(*texts: str | None, reason: str | None = "stop", **fields: Any) -> dict[str, Any]:
    """The body of a good response."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": reason, **fields}
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": 2 * len(texts)}}


@dataclass
class Server:
    """What the server does and has seen.

    Attributes:
        plan: answers to the first chat requests, in the order of their arrival; the rest are good.
        reply: body of a good response to a request's body.
        models: answer to a request for the list of models.
        requests: bodies of the chat requests.
        headers: their headers, with names in lower case.
        most: largest number of chat requests at one time.
    """

    url: str = ""
    plan: list[Answer] = field(default_factory=list)
    reply: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: completion(
        *[f"echo: {body['messages'][-1]['content']}"] * body.get("n", 1)
    )
    models: Answer = field(default_factory=lambda: {"object": "list", "data": []})
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most: int = 0
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self.lock:
            self.requests.append(body)
            self.headers.append(headers)
            answer = self.plan.pop(0) if self.plan else "good"
        return self.reply(body) if answer == "good" else answer


@contextmanager
def serving() -> Iterator[Server]:
    """The server, on a free port."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send(server.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.running += 1
                server.most = max(server.most, server.running)
            try:
                answer = server.answer(body, {name.lower(): value for name, value in self.headers.items()})
            finally:
                with server.lock:
                    server.running -= 1
            self.send(answer)

        def send(self, answer: Answer) -> None:
            if answer == "hang":
                server.released.wait(30)
                self.close_connection = True
                return
            if answer == "headers":
                with suppress(OSError):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    while not server.released.wait(0.02):
                        self.wfile.write(b"X-More: 1\r\n")
                self.close_connection = True
                return
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
            content = b'{"choices": [' if body == "malformed" else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) + 50 * (answer == "cut") + 10**6 * (body == "drip")))
            self.end_headers()
            with suppress(OSError):
                while body == "drip" and not server.released.wait(0.02):
                    self.wfile.write(b" ")
            self.wfile.write(content)
            self.close_connection = answer == "cut" or body == "drip"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()


class FakeClock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.time, self.slept, self.lock = 0.0, list[float](), threading.Lock()

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        with self.lock:
            self.slept.append(seconds)
            self.time += seconds
