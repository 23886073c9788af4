"""Sends a request to the routers until an engine answers it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping

import httpx
import prometheus_client as prometheus

from mixquant.serve import answers
from mixquant.serve.answers import BROKEN, UNREADY, loggable, own_error
from mixquant.serve.routes import NEED_TRANSFER, RouteName

LOG = logging.getLogger("uvicorn.error")  # the server sets up its handler and level
# s before each attempt on a route. A router needs a second to notice that an engine died; on a busy
# machine it needs seconds to see that an engine it took for dead is alive.
PAUSES = (0.0, 1.5, 3.0, 6.0)
MAX_FAULTS = 2  # on a route: the request itself may be what crashes engines
MAX_CRASHES = 2  # crashes that engines report, on both routes together

ROUTED = prometheus.Counter(
    "mixquant_routed",
    "Attempts to serve a request: sent to a prefill engine and then to a decode engine (transfer), "
    "or to a decode engine alone (direct), and why",
    ["route", "reason"],
)


class Attempts:
    """The attempts of one front. Any request that an engine works on may be the one that crashes
    it.

    Args:
        upstream: connections to the routers.
        routers: for each route the address of its router.
        decode_fallback: whether a decode engine takes over when no prefill engine can.
    """

    def __init__(
        self, upstream: httpx.AsyncClient, routers: Mapping[RouteName, str], decode_fallback: bool
    ) -> None:
        self._upstream = upstream
        self._routers = routers
        self._decode_fallback = decode_fallback
        self._in_flight = self._started = 0  # requests: now, and ever

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Held for each request from its first attempt until its answer is sent."""
        self._in_flight += 1
        self._started += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def first_answer(
        self, path: str, content: bytes, headers: dict[str, str], route: RouteName, reason: str
    ) -> httpx.Response:
        """The first answer that is not a sign of a dead engine, or the last answer if there is
        none."""
        last: httpx.Response | None = None
        attempt = faults = crashes = 0
        found: list[str] = []
        while True:
            await asyncio.sleep(PAUSES[attempt])
            ROUTED.labels(route, reason).inc()
            others, started_before = self._in_flight > 1, self._started
            broke_off = False
            try:
                request = self._upstream.build_request(
                    "POST", self._routers[route] + path, content=content, headers=headers
                )
                answer = await self._upstream.send(request, stream=True)
                if answer.status_code in BROKEN:
                    async with contextlib.aclosing(answer):
                        await answer.aread()
                    answer = answers.refused_by_prefill(answer) or answer
                status = answer.status_code
            except httpx.HTTPError as error:
                answer, status = None, 502
                broke_off = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                found.append(f"{route}: {type(error).__name__}")
            if status not in BROKEN:
                assert answer is not None
                return answer
            final = False
            if answer is not None:
                found.append(f"{route}: {loggable(answer)}")
                last = answer
                error_of_its_own = own_error(answer)
                if error_of_its_own is not None:
                    # The next engine would answer the same request with the same error.
                    dead = answers.DEAD in error_of_its_own
                    crashes += dead
                    final = not self._may_be_tried_again(error_of_its_own) or crashes == MAX_CRASHES
                    alone = not others and self._started == started_before
                    final = final or (dead and alone)
            attempt += 1
            # A request whose connection broke off was sent, and may have crashed an engine or a router.
            faults += status not in UNREADY or broke_off
            if final:
                LOG.warning("an engine failed at a request; attempts: %s", "; ".join(found))
                assert last is not None
                return last
            if (
                route == "transfer"
                and self._decode_fallback
                and path not in NEED_TRANSFER
                and (status in UNREADY or attempt > 1)
            ):
                # There is no prefill engine, or two attempts met a dead one.
                route, reason = "direct", "fallback"
                attempt = faults = 0
            elif attempt == len(PAUSES) or faults == MAX_FAULTS:
                LOG.warning("no engine served a request; attempts: %s", "; ".join(found))
                return last or httpx.Response(503)

    def _may_be_tried_again(self, message: str) -> bool:
        """Whether an engine's error may have another cause than this request."""
        lost = message == answers.GAVE_UP and not self._decode_fallback
        return lost or answers.DEAD in message
