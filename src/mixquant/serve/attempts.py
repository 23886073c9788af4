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

LOG = logging.getLogger("uvicorn.error")  # whose handler and level the server sets up
# s before each attempt on a route: a router takes a second to notice a death, and seconds on a busy
# machine to find an engine well again that it thought dead.
PAUSES = (0.0, 1.5, 3.0, 6.0)
MOST_FAULTS = 2  # on a route: the request itself may be what engines die of
MOST_DEATHS = 2  # of engines that say so themselves, on both routes together

ROUTED = prometheus.Counter(
    "mixquant_routed",
    "Attempts to serve a request: sent to a prefill engine and then to a decode engine (transfer), "
    "or to a decode engine alone (direct), and why",
    ["route", "reason"],
)


class Attempts:
    """The attempts of one front. An engine that dies may die of any request that it works on.

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
        """The first answer that is no sign of a dead engine, or else the last one."""
        last: httpx.Response | None = None
        attempt = faults = deaths = 0
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
                    # The next engine would meet the same request with the same error.
                    dead = answers.DEAD in error_of_its_own
                    deaths += dead
                    final = not self._may_be_tried_again(error_of_its_own) or deaths == MOST_DEATHS
                    alone = not others and self._started == started_before
                    final = final or (dead and alone)
            attempt += 1
            # A connection that broke off had the request, which an engine or a router may have died of.
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
                # No prefill engine is there, or two attempts found one that died.
                route, reason = "direct", "fallback"
                attempt = faults = 0
            elif attempt == len(PAUSES) or faults == MOST_FAULTS:
                LOG.warning("no engine served a request; attempts: %s", "; ".join(found))
                return last or httpx.Response(503)

    def _may_be_tried_again(self, message: str) -> bool:
        """Whether an engine's own error need not be about the request that met it."""
        lost = message == answers.GAVE_UP and not self._decode_fallback
        return lost or answers.DEAD in message
