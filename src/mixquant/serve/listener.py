"""uvicorn with two limits that it has no options for: connections, and a deadline for each request.

A client that sends half of a request and waits, or reads half of an answer, takes memory and a file
descriptor for as long as it likes. uvicorn's own timeout is for connections that send nothing at
all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from socket import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "request_timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

LARGEST_BODIES = 64  # so many bodies of the largest size are held at a time


@dataclass(frozen=True)
class Limits:
    """The limits of one client.

    Attributes:
        body_bytes: of one request's body; a larger one is answered with status 413.
        request_seconds: from a connection, or the end of the answer before, to the end of a request's
            headers, and from there to the end of its body; after it, status 408. Also the time in which
            a client has to read half of what waits for it; after it, the connection is cut.
        connections: at a time. One that asks for nothing is cut for a new one; where all ask, the new
            one is answered with status 503.
    """

    body_bytes: int = 16 * 2**20
    request_seconds: float = 60
    connections: int = 1024

    @property
    def total_body_bytes(self) -> int:
        """Of the bodies that are held at a time; status 503 for those beyond."""
        return LARGEST_BODIES * self.body_bytes


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error in the shape of OpenAI's API."""
    kind = ERROR_TYPES.get(
        status, "invalid_request_error" if status < 500 else "service_unavailable"
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP with these limits."""

    # Connections without a request in progress; the one that has waited longest comes first.
    idle: dict[Limited, None] = {}

    def cut_longest_idle() -> bool:
        for one in idle:
            del idle[one]
            one.transport.abort()
            return True
        return False

    class Limited(H11Protocol):
        deadline: asyncio.TimerHandle | None = None
        reading_deadline: asyncio.TimerHandle | None = None
        received = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # Writing pauses as soon as a client does not read everything, and resumes once it has. So
            # the deadline for reading also ends connections that are to be closed.
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) > limits.connections and not cut_longest_idle():
                self._refuse(503, "the server has as many connections as it takes; try again later")
            else:
                idle[self] = None
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            idle.pop(self, None)
            self._wait_no_more()
            self._wait_for_reader_no_more()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait_for_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._wait_for_reader_no_more()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self.received = True
            super().data_received(data)
            if self._answering():
                idle.pop(self, None)
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self._wait_no_more()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.received = False
            if not self._answering():
                idle[self] = None
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._wait()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is not a request in HTTP, or its headers are too long")

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait_for_reader(self) -> None:
            left = self.transport.get_write_buffer_size()
            self.reading_deadline = self.loop.call_later(
                limits.request_seconds, self._read_too_slowly, left
            )

        def _wait_for_reader_no_more(self) -> None:
            if self.reading_deadline is not None:
                self.reading_deadline.cancel()
                self.reading_deadline = None

        def _read_too_slowly(self, left: int) -> None:
            if 2 * self.transport.get_write_buffer_size() > left:
                self.transport.abort()
            else:
                self._wait_for_reader()

        def _wait(self) -> None:
            self._wait_no_more()
            self.deadline = self.loop.call_later(limits.request_seconds, self._too_late)

        def _wait_no_more(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _too_late(self) -> None:
            if self.transport.is_closing():
                return
            if self.conn.their_state is h11.SEND_BODY and self._answering():
                # The code that reads the body answers with 408, and has the same time for that.
                self._wait()
            elif self.conn.their_state is h11.IDLE and self.received:
                seconds = limits.request_seconds
                self._refuse(408, f"the request was not complete within {seconds:g} s")
            else:
                self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            self._wait_no_more()
            content = json.dumps(error_body(status, message)).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
            self.transport.close()

    return Limited


async def serve(
    app: Any, sockets: Sequence[socket], limits: Limits, drain: float, inner: Any, address: str
) -> None:
    """Serves an application to clients, and another one to this set, until SIGTERM or SIGINT.

    Args:
        app: the application for clients.
        sockets: that it listens on.
        limits: of clients; the inner application has none.
        drain: seconds that answers have to end in, then.
        inner: the other application, for this set's own processes and for metrics.
        address: ``host:port`` that the inner application listens on.
    """
    # Each client takes two descriptors: its own, and one to a router.
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    public = uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=max(1, round(drain)),
        )
    )
    host, _, port = address.rpartition(":")
    inner_server = _WithoutSignals(
        uvicorn.Config(
            inner,
            http="h11",
            ws="none",
            host=host.strip("[]"),
            port=int(port),
            log_level="warning",
            lifespan="off",
        )
    )
    serving_inner = asyncio.create_task(inner_server.serve())
    try:
        await public.serve(sockets=list(sockets))
    finally:
        inner_server.should_exit = True
        await serving_inner


class _WithoutSignals(uvicorn.Server):
    """A server that leaves signals to the other one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
