"""An OpenAI-compatible server over real HTTP whose answers, and failures, a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


class Drop(Exception):
    """Raised by a stub's ``answer``: the connection ends without one."""


@dataclass
class Refuse(Exception):
    """Raised by a stub's ``answer``: an error of HTTP; the client is to wait a millisecond."""

    status: int
    message: str = "not now"


def question(body: Body) -> tuple[str, int | None]:
    """What tells requests apart: the last message, and the seed."""
    return body["messages"][-1]["content"], body.get("seed")


@dataclass
class Stub:
    """The server.

    Attributes:
        answer: makes the text, or the message, of a reply from a request's body; may raise `Drop` or
            `Refuse`, or block.
        asked: all requests, in order.
        times: how often each `question` was asked, answered or not.
        at_once: the most requests that were in work at a time.
    """

    answer: Callable[[Body], str | dict[str, Any]]
    models: dict[str, int | None] = field(default_factory=lambda: {"stub": 4096})
    key: str | None = None
    asked: list[Body] = field(default_factory=list)
    times: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    at_once: int = 0
    url: str = ""
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, body: Body) -> dict[str, Any]:
        with self._lock:
            self.asked.append(body)
            self.times[question(body)] += 1
            self._running += 1
            self.at_once = max(self.at_once, self._running)
        try:
            message = self.answer(body)
        finally:
            with self._lock:
                self._running -= 1
        if isinstance(message, str):
            message = {"content": message}
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": None, **message},
        }
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }


@contextlib.contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            if stub.key and self.headers.get("Authorization") != f"Bearer {stub.key}":
                self.reply(401, {"error": {"message": "wrong key"}})
                return
            models = [{"id": name, "max_model_len": at} for name, at in stub.models.items()]
            self.reply(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.reply(200, stub.complete(body))
            except Drop:
                self.close_connection = True
            except Refuse as refusal:
                self.reply(refusal.status, {"error": {"message": refusal.message}})

        def reply(self, status: int, values: dict[str, Any]) -> None:
            text = json.dumps(values).encode()
            # A client that was killed does not take it.
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(text)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def until(true: Callable[[], bool], *, patience: float = 180) -> None:
    """Waits for what another thread or process is about to do."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)
