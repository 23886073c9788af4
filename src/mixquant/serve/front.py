"""The address of a disaggregated set: asks for the key, and sends each request where it belongs.

vllm-router does the routing. This stands before it for what it cannot do: it has no key for clients, it
sends every prompt through both engines however short, it does not try again what an engine that died
was working on, and without a prefill engine it serves nothing.

Run by path or with ``-m``. It imports nothing of mixquant, so that it starts at once.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

LOG = logging.getLogger("uvicorn.error")  # whose handler and level the server sets up
BYTES_PER_TOKEN = 4  # of English text and code; what decides is a rough measure of worth
CLIENT_GONE = 499
UNREADY = (502, 503, 504)
BROKEN = (500, *UNREADY)
# s before each attempt on a route: a router takes a second to notice a death, and seconds on a busy
# machine to find an engine well again that it thought dead.
PAUSES = (0.0, 1.5, 3.0, 6.0)
MOST_FAULTS = 2  # on a route: the request itself may be what engines die of
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
    """

    transfer: str
    direct: str
    min_transfer_tokens: int
    decode_fallback: bool
    engine_key: str
    api_key: str | None


def application(settings: Settings, client: httpx.AsyncClient | None = None) -> Starlette:
    """The server, as an ASGI application."""
    # An answer may take as long as it wants; a dead peer is noticed by its connection.
    upstream = client or httpx.AsyncClient(
        trust_env=False,
        timeout=httpx.Timeout(None, connect=5),
        limits=httpx.Limits(max_connections=None),
    )

    async def generate(request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw, parse_constant=no_number)
        except (ValueError, RecursionError):
            return failure(400, "the request's body is not JSON")
        if not isinstance(body, dict):
            return failure(400, "the request's body has to be a JSON object")
        # Where to fetch a KV cache from is the router's to say, not the client's.
        body.pop("kv_transfer_params", None)
        route, reason = route_of(body, settings.min_transfer_tokens)
        headers = {"Authorization": f"Bearer {settings.engine_key}"}
        headers |= {k: v for k in PASSED_ON if (v := request.headers.get(k)) is not None}
        if "x-session-id" not in headers and (session := session_of(body)):
            headers["x-session-id"] = session
        answer = await first_that_answers(request.url.path, body, headers, route, reason)
        return await relayed(answer, bool(body.get("stream")))

    async def first_that_answers(
        path: str, body: dict[str, Any], headers: dict[str, str], route: str, reason: str
    ) -> httpx.Response:
        """The first answer that is no sign of a dead engine, or else the last one."""
        last: httpx.Response | None = None
        attempt = faults = 0
        found: list[str] = []
        while True:
            await asyncio.sleep(PAUSES[attempt])
            ROUTED.labels(route, reason).inc()
            base = settings.transfer if route == "transfer" else settings.direct
            try:
                answer = await upstream.send(
                    upstream.build_request("POST", base + path, json=body, headers=headers),
                    stream=True,
                )
                status = answer.status_code
            except httpx.HTTPError as error:
                answer, status = None, 502
                found.append(f"{route}: {type(error).__name__}")
            if status not in BROKEN:
                assert answer is not None
                return answer
            if answer is not None:
                with contextlib.suppress(httpx.HTTPError):
                    await answer.aread()
                await answer.aclose()
                found.append(f"{route}: {said_by_router(answer)}")
                last = answer
            attempt += 1
            faults += status not in UNREADY
            if (
                route == "transfer"
                and settings.decode_fallback
                and (status in UNREADY or attempt > 1)
            ):
                # No prefill engine is there, or two attempts found one that died.
                route, reason = "direct", "fallback"
                attempt = faults = 0
            elif attempt == len(PAUSES) or faults == MOST_FAULTS:
                LOG.warning("no engine served a request; attempts: %s", "; ".join(found))
                return last or httpx.Response(503)

    async def relayed(answer: httpx.Response, streams: bool) -> Response:
        headers = {
            name: answer.headers[name]
            for name in ("content-type", "x-request-id")
            if name in answer.headers
        }
        if answer.status_code in BROKEN:
            return unready(answer)
        if streams and answer.status_code == 200:
            return StreamingResponse(pieces(answer), 200, headers)
        try:
            content = await answer.aread()
        except httpx.HTTPError:
            return failure(502, "the engine that was answering ended; try again")
        return Response(content, answer.status_code, headers)

    async def generate_while_waited_for(request: Request) -> Response:
        await request.body()
        work = asyncio.ensure_future(generate(request))
        gone = asyncio.ensure_future(disconnected(request))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return Response(status_code=CLIENT_GONE)
        return work.result()

    async def forward(request: Request) -> Response:
        """What is no generation: to a decode engine, as it is."""
        try:
            answer = await upstream.request(
                request.method,
                settings.direct + request.url.path,
                content=await request.body(),
                headers={
                    "Authorization": f"Bearer {settings.engine_key}",
                    "Content-Type": request.headers.get("content-type", "application/json"),
                },
            )
        except httpx.HTTPError:
            return unready(None)
        if answer.status_code in BROKEN:
            return unready(answer)
        kind = answer.headers.get("content-type")
        return Response(answer.content, answer.status_code, {"content-type": kind} if kind else {})

    async def ready(base: str) -> bool:
        headers = {"Authorization": f"Bearer {settings.engine_key}"}
        try:
            answer = await upstream.get(base + "/readiness", headers=headers, timeout=10)
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

    async def metrics(request: Request) -> Response:
        return Response(prometheus.generate_latest(), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def key_check(request: Request) -> Response:
        """For the routers, whose only guard is an address that says whether a token is right."""
        right = shows(request, settings.engine_key)
        return PlainTextResponse("right" if right else "wrong", 200 if right else 401)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await upstream.aclose()

    guarded = {
        "/v1/chat/completions": (generate_while_waited_for, "POST"),
        "/v1/completions": (generate_while_waited_for, "POST"),
        "/v1/models": (forward, "GET"),
        "/tokenize": (forward, "POST"),
        "/detokenize": (forward, "POST"),
    }
    routes = [
        Route(path, guard(settings.api_key, endpoint), methods=[method])
        for path, (endpoint, method) in guarded.items()
    ]
    routes += [
        Route("/health", health),
        Route("/ready", whole),
        Route("/metrics", metrics),
        Route("/internal/key-check", key_check),
    ]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={404: unknown, 405: unknown}
    )


def route_of(body: dict[str, Any], least: int) -> tuple[str, str]:
    """Whether a request is worth, and able to make, the way over a prefill engine; and why not."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int)
    if several or any(isinstance(body.get(key), int) and body[key] > 1 for key in ("n", "best_of")):
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
    parts = [prompt, body.get("messages"), body.get("tools")]
    size = sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in parts if part)
    return size // BYTES_PER_TOKEN


def session_of(body: dict[str, Any]) -> str | None:
    """What the turns of one conversation share, so that all reach the engines that hold its cache.

    A client can name its session itself (``x-session-id``, ``user``); for others it is what the
    conversation began with, up to the first message of its user.
    """
    if body.get("user"):
        return hashlib.sha256(str(body["user"]).encode()).hexdigest()[:32]
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    opening = []
    for message in messages:
        opening.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).hexdigest()[:32]


async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """A streamed answer as it comes. One that breaks off ends with an error that clients read."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.HTTPError:
        error = error_body(502, "the engine that was answering ended; try again")
        yield f"data: {json.dumps(error)}\n\n".encode()
    finally:
        await answer.aclose()


def no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")  # though Python reads it


async def disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


def shows(request: Request, key: str) -> bool:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), key.encode())


def guard(
    key: str | None, endpoint: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that asks for the key, and whose answers are counted."""

    async def guarded(request: Request) -> Response:
        if key is not None and not shows(request, key):
            answer: Response = failure(401, "the API key is wrong or missing")
        else:
            answer = await endpoint(request)
        REQUESTS.labels(request.url.path, str(answer.status_code)).inc()
        return answer

    return guarded


def error_body(status: int, message: str) -> dict[str, Any]:
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
    return {
        "error": {
            "message": message,
            "type": kinds.get(status, "service_unavailable"),
            "code": status,
        }
    }


def failure(status: int, message: str) -> Response:
    retry = {"retry-after": "5"} if status in UNREADY else {}
    return JSONResponse(error_body(status, message), status, retry)


def unready(answer: httpx.Response | None) -> Response:
    """One message for whatever a router says when engines are gone; a real fault keeps its own."""
    if (
        answer is not None
        and answer.status_code == 500
        and "application/json" in answer.headers.get("content-type", "")
    ):
        return Response(answer.content, 500, media_type="application/json")
    return failure(503, "no engine can serve this now: one ended and starts again; try again later")


def said_by_router(answer: httpx.Response) -> str:
    """What a log may say of an answer: what engines say is JSON, and can hold parts of a prompt."""
    if "json" in answer.headers.get("content-type", ""):
        return str(answer.status_code)
    with contextlib.suppress(httpx.ResponseNotRead):
        return f"{answer.status_code} {answer.text[:300]}"
    return str(answer.status_code)


async def unknown(request: Request, error: Exception) -> Response:
    return failure(404, f"{request.method} {request.url.path} is not served here")


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(prog="mixquant.serve.front")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--transfer", required=True, metavar="URL")
    parser.add_argument("--direct", required=True, metavar="URL")
    parser.add_argument("--min-transfer-tokens", type=int, default=256)
    parser.add_argument("--no-decode-fallback", action="store_true")
    parser.add_argument("--drain-timeout", type=float, default=30)
    given = parser.parse_args()
    settings = Settings(
        given.transfer,
        given.direct,
        given.min_transfer_tokens,
        not given.no_decode_fallback,
        os.environ["MIXQUANT_ENGINE_KEY"],
        os.environ.get("MIXQUANT_API_KEY") or None,
    )
    uvicorn.run(
        application(settings),
        host=given.host,
        port=given.port,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(given.drain_timeout)),
    )


if __name__ == "__main__":
    main()
