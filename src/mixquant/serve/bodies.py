"""Reads the bodies of clients' requests within limits, and parses large ones outside the event
loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from mixquant.serve.accepted import Refused
from mixquant.serve.listener import Limits

CLIENT_GONE = 499
# bytes: a body that takes milliseconds does not wait behind one that takes seconds
PARSED_AT_ONCE = 64 * 2**10
PARSERS = 2  # threads: a parsed body can take fifty times the memory of its text

T = TypeVar("T")


class Bodies:
    """All bodies that one server holds at the same time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0  # bytes
        self._parsers = ThreadPoolExecutor(PARSERS, "parser")

    async def read(self, request: Request, until_sent: ExitStack) -> bytes:
        """The body of a request.

        Args:
            until_sent: closed when the request is answered; the body counts as held until then.

        Raises:
            Refused: with status 413, it is too large; 408, it comes too slowly; 503, the bodies that are
                held are too large together; 499, the client has gone.
        """
        limits = self._limits
        too_large = Refused(413, f"the request's body has more than {limits.body_bytes} bytes")
        declared = request.headers.get("content-length", "0")
        if int(declared) > limits.body_bytes and "expect" in request.headers:
            raise too_large  # before it is sent
        share = until_sent.enter_context(_Share(self))
        size, pieces = 0, []
        refused: Refused | None = None
        try:
            async with asyncio.timeout(limits.request_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if refused is not None:
                        continue  # read to the end nevertheless, or the client would not see the reason
                    if size > limits.body_bytes:
                        refused = too_large
                    elif not share.grow(len(piece)):
                        refused = Refused(
                            503, "the server holds as many requests as it takes; try again later"
                        )
                    else:
                        pieces.append(piece)
                        continue
                    pieces.clear()
                    share.close()
        except TimeoutError:
            refused = refused or Refused(
                408, f"the request's body did not come within {limits.request_seconds:g} s"
            )
        except ClientDisconnect:
            raise Refused(CLIENT_GONE, "the client has gone") from None
        if refused is not None:
            raise refused
        return b"".join(pieces)

    async def parsed(self, raw: bytes, parse: Callable[[bytes], T]) -> T:
        """The result of ``parse`` for a body. A large body does not block other requests."""
        if len(raw) <= PARSED_AT_ONCE:
            return parse(raw)
        return await asyncio.get_running_loop().run_in_executor(self._parsers, parse, raw)


class _Share:
    """The bytes that one request holds."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._bytes = 0

    def grow(self, more: int) -> bool:
        """Counts more bytes; returns whether there was room for them."""
        if self._bodies._held + more > self._bodies._limits.total_body_bytes:
            return False
        self._bodies._held += more
        self._bytes += more
        return True

    def close(self) -> None:
        self._bodies._held -= self._bytes
        self._bytes = 0

    def __enter__(self) -> _Share:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
