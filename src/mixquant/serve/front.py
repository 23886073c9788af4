"""The address of a disaggregated set: asks for the key, and sends each request where it belongs.

vllm-router does the routing. This stands before it for what it cannot do: it has no key for clients, it
sends every prompt through both engines however short, it does not try again what an engine that died
was working on, without a prefill engine it serves nothing, and it passes on whatever a client sends.

Run through ``alone.py`` or with ``-m``. It imports nothing that needs torch, so that it starts at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mixquant.serve import answers, listener
from mixquant.serve.accepted import Refused, accepted
from mixquant.serve.answers import own_error
from mixquant.serve.bodies import CLIENT_GONE, Bodies
from mixquant.serve.listener import Limits, error_body

LOG = logging.getLogger("uvicorn.error")  # whose handler and level the server sets up
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MOST_OF_A_HEADER = 1000  # characters: of names of parameters
BYTES_PER_TOKEN = 4  # of English text and code; what decides is a rough measure of worth
# On its way to one engine alone the router, 0.1.17, does not show the engines of these paths the key.
NEED_TRANSFER = ("/v1/responses", "/v1/messages")
UNREADY = (502, 503, 504)
BROKEN = (500, *UNREADY)
# s before each attempt on a route: a router takes a second to notice a death, and seconds on a busy
# machine to find an engine well again that it thought dead.
PAUSES = (0.0, 1.5, 3.0, 6.0)
MOST_FAULTS = 2  # on a route: the request itself may be what engines die of
MOST_DEATHS = 2  # of engines that say so themselves, wherever
# What a client may say to the router: sessions, for its policies, and the trace.
PASSED_ON = ("x-session-id", "x-user-id", "x-tenant-id", "x-correlation-id", "traceparent")

REQUESTS = prometheus.Counter(
    "mixquant_requests", "Requests by what came of them", ["path", "status"]
)
ROUTED = prometheus.Counter(
    "mixquant_routed",
    "Attempts to serve a request: sent to a prefill engine and then to a decode engine (transfer), "
    "or to a decode engine alone (direct), and why",
    ["route", "reason"],
)


@dataclass(frozen=True)
class Settings:
    """What the front is started with.

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


@dataclass(frozen=True)
class Taken:
    """What is kept of a request while engines work on it. What it was parsed to takes far more memory.

    Attributes:
        content: JSON text in UTF-8.
        left_out: parameters that were not kept.
        streams: whether the answer comes in pieces.
        route: ``transfer`` or ``direct``.
        reason: why it takes this route.
        session: what the turns of its conversation share.
    """

    content: bytes
    left_out: tuple[str, ...]
    streams: bool = False
    route: str = "direct"
    reason: str = "prompt"
    session: str | None = None


Endpoint = Callable[[Request, ExitStack], Awaitable[Response]]


def application(settings: Settings, client: httpx.AsyncClient | None = None) -> Starlette:
    """The server, as an ASGI application."""
    # An answer may take as long as it wants; a dead peer is noticed by its connection.
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
    generating = begun = 0  # requests: now, and ever

    async def generate(request: Request, taken: Taken) -> Response:
        headers = to_router | passed_on(request)
        if "x-session-id" not in headers and taken.session:
            headers["x-session-id"] = taken.session
        answer = await first_that_answers(
            request.scope["path"], taken.content, headers, taken.route, taken.reason
        )
        return await relayed(answer, taken.streams)

    async def first_that_answers(
        path: str, content: bytes, headers: dict[str, str], route: str, reason: str
    ) -> httpx.Response:
        """The first answer that is no sign of a dead engine, or else the last one."""
        last: httpx.Response | None = None
        attempt = faults = deaths = 0
        found: list[str] = []
        while True:
            await asyncio.sleep(PAUSES[attempt])
            ROUTED.labels(route, reason).inc()
            base = settings.transfer if route == "transfer" else settings.direct
            others, begun_before = generating > 1, begun
            broke_off = False
            try:
                answer = await upstream.send(
                    upstream.build_request("POST", base + path, content=content, headers=headers),
                    stream=True,
                )
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
                found.append(f"{route}: {said_by_router(answer)}")
                last = answer
                error_of_its_own = own_error(answer)
                if error_of_its_own is not None:
                    # The next engine would meet the same request with the same error.
                    dead = answers.DEAD in error_of_its_own
                    deaths += dead
                    final = not may_be_tried_again(error_of_its_own) or deaths == MOST_DEATHS
                    alone = not others and begun == begun_before
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
                and settings.decode_fallback
                and path not in NEED_TRANSFER
                and (status in UNREADY or attempt > 1)
            ):
                # No prefill engine is there, or two attempts found one that died.
                route, reason = "direct", "fallback"
                attempt = faults = 0
            elif attempt == len(PAUSES) or faults == MOST_FAULTS:
                LOG.warning("no engine served a request; attempts: %s", "; ".join(found))
                return last or httpx.Response(503)

    def may_be_tried_again(message: str) -> bool:
        """Whether an engine's own error need not be about the request that met it."""
        lost = message == answers.GAVE_UP and not settings.decode_fallback
        return lost or answers.DEAD in message

    async def relayed(answer: httpx.Response, streams: bool) -> Response:
        if answer.status_code in BROKEN:
            return unready(answer)
        headers = {
            name: answer.headers[name]
            for name in ("content-type", "x-request-id")
            if name in answer.headers
        }
        if streams and answer.status_code == 200:
            return StreamingResponse(answers.pieces(answer), 200, headers)
        try:
            content = await answer.aread()
        except httpx.HTTPError:
            return failure(502, answers.BROKE_OFF)
        if answer.status_code >= 400:
            return refused(answer)
        return Response(answers.without_addresses(content), answer.status_code, headers)

    async def generate_while_waited_for(request: Request, until_sent: ExitStack) -> Response:
        nonlocal generating, begun
        taken = await taken_from(request, until_sent)
        generating += 1
        begun += 1
        until_sent.callback(generated)
        work = asyncio.ensure_future(generate(request, taken))
        gone = asyncio.ensure_future(disconnected(request))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return Response(status_code=CLIENT_GONE)
        return with_left_out(work.result(), taken)

    def generated() -> None:
        nonlocal generating
        generating -= 1

    async def taken_from(request: Request, until_sent: ExitStack) -> Taken:
        raw = await bodies.read(request, until_sent)
        path, least = request.scope["path"], settings.min_transfer_tokens
        return await bodies.parsed(raw, lambda content: taken_of(path, content, least))

    async def forward(request: Request, until_sent: ExitStack) -> Response:
        """What is no generation: to a decode engine."""
        taken = await taken_from(request, until_sent) if request.method == "POST" else None
        try:
            answer = await upstream.request(
                "POST" if taken else "GET",
                settings.direct + request.scope["path"],
                content=taken.content if taken else None,
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
        return with_left_out(response, taken) if taken else response

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
        **dict.fromkeys(GENERATES, (generate_while_waited_for, "POST")),
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
    app.router.redirect_slashes = False  # to wherever the client's Host header says
    return app


def inner_application(engine_key: str) -> Starlette:
    """What is not for clients: metrics, and the address that the routers ask about their key."""

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


def taken_of(path: str, raw: bytes, least: int) -> Taken:
    """What is kept of a request.

    Raises:
        Refused: it is no request.
    """
    given = accepted(path, raw)
    if path not in GENERATES:
        return Taken(given.content, given.left_out)
    route, reason = route_of(given.body, least)
    if path in NEED_TRANSFER:
        route, reason = "transfer", "prompt"
    streams, session = bool(given.body.get("stream")), session_of(given.body)
    return Taken(given.content, given.left_out, streams, route, reason, session)


def passed_on(request: Request) -> dict[str, str]:
    """Headers that a client may say to the router.

    Raises:
        Refused: one of them holds what a header cannot.
    """
    found = {name: value for name in PASSED_ON if (value := request.headers.get(name)) is not None}
    for name, value in found.items():
        if not value.isascii() or not value.isprintable():
            raise Refused(400, f"the header {name} has to be printable ASCII")
    return found


def route_of(body: dict[str, Any], least: int) -> tuple[str, str]:
    """Whether a request is worth, and able to make, the way over a prefill engine; and why not."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int)
    if (
        several
        or body.get("use_beam_search")
        or any(isinstance(body.get(key), int) and body[key] > 1 for key in ("n", "best_of"))
    ):
        # The KV cache that a prefill engine keeps is given up when it was read once.
        return "direct", "several_sequences"
    if body.get("prompt_logprobs") is not None or body.get("echo"):
        return "direct", "prompt_logprobs"  # which need the prompt's hidden states, not its cache
    if estimated_tokens(body) < least:
        return "direct", "short"
    return "transfer", "prompt"


def estimated_tokens(body: dict[str, Any]) -> int:
    """About how many tokens the prompt of a request has, without a tokenizer."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    names = ("messages", "tools", "system", "input", "instructions")
    parts = [prompt, *(body.get(name) for name in names)]
    size = sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in parts if part)
    return size // BYTES_PER_TOKEN


def session_of(body: dict[str, Any]) -> str | None:
    """What the turns of one conversation share, so that all reach the engines that hold its cache.

    A client can name its session itself (``x-session-id``, ``user``); for others it is what the
    conversation began with, up to the first message of its user.
    """
    if body.get("user"):
        return hashlib.sha256(str(body["user"]).encode()).hexdigest()[:32]
    messages = body.get("messages") or body.get("input")
    if not isinstance(messages, list):
        return None
    opening: list[Any] = [body.get("system"), body.get("instructions")]
    opening = [one for one in opening if one is not None]
    for message in messages:
        opening.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).hexdigest()[:32]


async def disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


def shows(request: Request, key: str) -> bool:
    """Whether a request shows the key, as clients of OpenAI's API do, or as those of Anthropic's."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    return hmac.compare_digest(token.encode(), key.encode())


class Guarded:
    """An endpoint that asks for the key, and whose answers are counted.

    The endpoint is given a stack of what it holds until its answer is sent.
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


def failure(status: int, message: str) -> Response:
    headers = {"retry-after": "5"} if status in UNREADY else {}
    if status in (408, 413):
        headers["connection"] = "close"  # what is left of the request is not wanted
    return JSONResponse(error_body(status, message), status, headers)


def refused(answer: httpx.Response) -> Response:
    """An answer that says what is wrong with a request, whoever gave it."""
    return JSONResponse(answers.refusal(answer), answer.status_code)


def with_left_out(response: Response, taken: Taken) -> Response:
    """A response that names the parameters which were not passed on."""
    names = [
        path
        for path in taken.left_out
        if path.isascii() and all(name.isidentifier() for name in path.split("."))
    ]
    while len(", ".join(names)) > MOST_OF_A_HEADER:
        names.pop()
    if names:
        response.headers["x-ignored-parameters"] = ", ".join(names)
    return response


def unready(answer: httpx.Response | None) -> Response:
    """One message for whatever a router says when engines are gone; a real fault keeps its own."""
    message = own_error(answer) if answer is not None else None
    if message is not None:
        if answers.DEAD in message:
            message = "an engine ended while it worked on this request, and starts again"
        # Or OpenAI's client would show it to the next engine.
        return JSONResponse(error_body(500, message), 500, {"x-should-retry": "false"})
    if answer is not None and answer.status_code == 500 and is_json(answer):
        return failure(500, answers.FAILED)
    return failure(503, "no engine can serve this now: one ended and starts again; try again later")


def is_json(answer: httpx.Response) -> bool:
    return "json" in answer.headers.get("content-type", "")


def said_by_router(answer: httpx.Response) -> str:
    """What a log may say of an answer: what engines say is JSON, and can hold parts of a prompt."""
    if is_json(answer) or own_error(answer) is not None or answers.quotes_prefill(answer):
        return str(answer.status_code)
    return f"{answer.status_code} {answer.text[:300]}"


async def unknown(request: Request, error: Exception) -> Response:
    return failure(404, f"{request.method} {request.scope['path']} is not served here")


async def own_fault(request: Request, error: Exception) -> Response:
    return failure(500, "the server failed at this request; its log says how")


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
    settings = Settings(
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
