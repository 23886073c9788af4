"""The public address of a disaggregated set: checks the key, and sends each request to a router.

vllm-router does the routing. The front adds what the router lacks: the router has no key for
clients, sends every prompt through both engines however short it is, does not retry the requests of
an engine that died, serves nothing without a prefill engine, and passes on whatever a client sends.

Run through ``alone.py`` or with ``-m``. It imports nothing that needs torch, so it starts at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mixquant.serve import answers, listener
from mixquant.serve.accepted import Refused
from mixquant.serve.answers import BROKEN
from mixquant.serve.attempts import Attempts
from mixquant.serve.bodies import CLIENT_GONE, Bodies
from mixquant.serve.listener import Limits
from mixquant.serve.responses import (
    failure,
    own_fault,
    refused,
    relayed,
    unknown,
    unready,
    with_left_out,
)
from mixquant.serve.routes import (
    GENERATES,
    RoutedRequest,
    RouteName,
    passed_on,
    routed_request,
)

REQUESTS = prometheus.Counter(
    "mixquant_requests", "Requests by path and status", ["path", "status"]
)


@dataclass(frozen=True)
class FrontSettings:
    """The settings of a front.

    Attributes:
        transfer: address of the router that knows the prefill and decode engines.
        direct: address of the router that knows the decode engines alone.
        min_transfer_tokens: estimated tokens of a prompt from which on it is worth a transfer.
        decode_fallback: whether a decode engine takes over when no prefill engine can.
        engine_key: shown to the routers.
        api_key: asked of clients; None: nothing is.
        limits: what one client may take.
    """

    transfer: str
    direct: str
    min_transfer_tokens: int
    decode_fallback: bool
    engine_key: str
    api_key: str | None
    limits: Limits = field(default_factory=Limits)


Endpoint = Callable[[Request, ExitStack], Awaitable[Response]]


def application(settings: FrontSettings, client: httpx.AsyncClient | None = None) -> Starlette:
    """The server for clients, as an ASGI application."""
    # No time limit for an answer: a dead peer closes its connection.
    upstream = client or httpx.AsyncClient(
        trust_env=False,
        timeout=httpx.Timeout(None, connect=5),
        limits=httpx.Limits(max_connections=None),
    )
    to_router = {
        "Authorization": f"Bearer {settings.engine_key}",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
    }
    bodies = Bodies(settings.limits)
    routers: dict[RouteName, str] = {"transfer": settings.transfer, "direct": settings.direct}
    attempts = Attempts(upstream, routers, settings.decode_fallback)

    async def generate(request: Request, routed: RoutedRequest) -> Response:
        headers = to_router | passed_on(request)
        if "x-session-id" not in headers and routed.session:
            headers["x-session-id"] = routed.session
        answer = await attempts.first_answer(
            request.scope["path"], routed.content, headers, routed.route, routed.reason
        )
        return await relayed(answer, routed.streams)

    async def generate_until_disconnected(request: Request, until_sent: ExitStack) -> Response:
        routed = await read_request(request, until_sent)
        until_sent.enter_context(attempts.in_flight())
        work = asyncio.ensure_future(generate(request, routed))
        gone = asyncio.ensure_future(disconnected(request))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return Response(status_code=CLIENT_GONE)
        return with_left_out(work.result(), routed)

    async def read_request(request: Request, until_sent: ExitStack) -> RoutedRequest:
        raw = await bodies.read(request, until_sent)
        path, least = request.scope["path"], settings.min_transfer_tokens
        return await bodies.parsed(raw, lambda content: routed_request(path, content, least))

    async def forward(request: Request, until_sent: ExitStack) -> Response:
        """Sends what is no generation to a decode engine."""
        routed = await read_request(request, until_sent) if request.method == "POST" else None
        try:
            answer = await upstream.request(
                "POST" if routed else "GET",
                settings.direct + request.scope["path"],
                content=routed.content if routed else None,
                headers=to_router,
            )
        except httpx.HTTPError:
            return unready(None)
        if answer.status_code in BROKEN:
            return unready(answer)
        if answer.status_code >= 400:
            return refused(answer)
        content = answer.content
        if request.scope["path"] == "/v1/models":
            try:
                content = answers.models(content)
            except (ValueError, KeyError, TypeError):
                return unready(None)
        kind = answer.headers.get("content-type")
        response = Response(content, answer.status_code, {"content-type": kind} if kind else {})
        return with_left_out(response, routed) if routed else response

    async def ready(base: str) -> bool:
        try:
            answer = await upstream.get(base + "/readiness", headers=to_router, timeout=10)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def health(request: Request) -> Response:
        """Whether requests can be served."""
        fine = await ready(settings.direct)
        fine = fine and (settings.decode_fallback or await ready(settings.transfer))
        return PlainTextResponse("ok" if fine else "engines are missing", 200 if fine else 503)

    async def whole(request: Request) -> Response:
        """Whether they can be served as they are meant to be, with prefill on its own engines."""
        fine = await ready(settings.direct) and await ready(settings.transfer)
        return PlainTextResponse("ok" if fine else "engines are missing", 200 if fine else 503)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await upstream.aclose()

    guarded: dict[str, tuple[Endpoint, str]] = {
        **dict.fromkeys(GENERATES, (generate_until_disconnected, "POST")),
        "/v1/models": (forward, "GET"),
        "/tokenize": (forward, "POST"),
        "/detokenize": (forward, "POST"),
    }
    routes = [
        Route(path, Guarded(settings.api_key, endpoint), methods=[method])
        for path, (endpoint, method) in guarded.items()
    ]
    routes += [Route("/health", health), Route("/ready", whole)]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={404: unknown, 405: unknown, Exception: own_fault},
    )
    app.router.redirect_slashes = (
        False  # a redirect would go wherever the client's Host header says
    )
    return app


def inner_application(engine_key: str) -> Starlette:
    """The server for this set: metrics, and the address at which routers check their key."""

    async def metrics(request: Request) -> Response:
        return Response(prometheus.generate_latest(), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def key_check(request: Request) -> Response:
        """For the routers, whose only guard is an address that says whether a token is right."""
        right = shows(request, engine_key)
        return PlainTextResponse("right" if right else "wrong", 200 if right else 401)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/internal/key-check", key_check)],
        exception_handlers={404: unknown, 405: unknown},
    )


async def disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


def shows(request: Request, key: str) -> bool:
    """Whether a request has the key, as clients of OpenAI's or of Anthropic's API send it."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    return hmac.compare_digest(token.encode(), key.encode())


class Guarded:
    """An endpoint that requires the key, and whose answers are counted.

    The endpoint gets an exit stack that is closed after its answer is sent.
    """

    def __init__(self, key: str | None, endpoint: Endpoint) -> None:
        self.key, self.endpoint = key, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        with ExitStack() as until_sent:
            answer = await self.answer(request, until_sent)
            REQUESTS.labels(request.scope["path"], str(answer.status_code)).inc()
            await answer(scope, receive, send)

    async def answer(self, request: Request, until_sent: ExitStack) -> Response:
        if self.key is not None and not shows(request, self.key):
            return failure(401, "the API key is wrong or missing")
        try:
            return await self.endpoint(request, until_sent)
        except Refused as error:
            return failure(error.status, error.message)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mixquant.serve.front")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, metavar="N", help="listen on this file descriptor")
    parser.add_argument("--inner", required=True, metavar="HOST:PORT")
    parser.add_argument("--transfer", required=True, metavar="URL")
    parser.add_argument("--direct", required=True, metavar="URL")
    parser.add_argument("--min-transfer-tokens", type=int, default=256)
    parser.add_argument("--no-decode-fallback", action="store_true")
    parser.add_argument("--drain-timeout", type=float, default=30)
    parser.add_argument("--max-body-bytes", type=int, default=Limits.body_bytes)
    parser.add_argument("--request-timeout", type=float, default=Limits.request_seconds)
    parser.add_argument("--max-connections", type=int, default=Limits.connections)
    given = parser.parse_args()
    limits = Limits(given.max_body_bytes, given.request_timeout, given.max_connections)
    settings = FrontSettings(
        given.transfer,
        given.direct,
        given.min_transfer_tokens,
        not given.no_decode_fallback,
        os.environ["MIXQUANT_ENGINE_KEY"],
        os.environ.get("MIXQUANT_API_KEY") or None,
        limits,
    )
    if given.fd is None:
        family = socket.AF_INET6 if ":" in given.host else socket.AF_INET
        public = socket.create_server((given.host, given.port), family=family)
    else:
        public = socket.socket(fileno=given.fd)
    asyncio.run(
        listener.serve(
            application(settings),
            [public],
            limits,
            given.drain_timeout,
            inner_application(settings.engine_key),
            given.inner,
        )
    )


if __name__ == "__main__":
    main()
