"""The responses of the front to its clients."""

from __future__ import annotations

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mixquant.serve import answers
from mixquant.serve.answers import BROKEN, UNREADY, own_error
from mixquant.serve.listener import error_body
from mixquant.serve.routes import RoutedRequest

MAX_HEADER_CHARACTERS = 1000  # characters; for the names of parameters


async def relayed(answer: httpx.Response, streams: bool) -> Response:
    """A router's answer to a generation, for the client."""
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


def failure(status: int, message: str) -> Response:
    headers = {"retry-after": "5"} if status in UNREADY else {}
    if status in (408, 413):
        headers["connection"] = "close"  # the rest of the request is not read
    return JSONResponse(error_body(status, message), status, headers)


def refused(answer: httpx.Response) -> Response:
    """The response to a request with a mistake, whether a router or an engine found it."""
    return JSONResponse(answers.refusal(answer), answer.status_code)


def with_left_out(response: Response, request: RoutedRequest) -> Response:
    """The response with a header that names the parameters that were not passed on."""
    names = [
        path
        for path in request.left_out
        if path.isascii() and all(name.isidentifier() for name in path.split("."))
    ]
    while len(", ".join(names)) > MAX_HEADER_CHARACTERS:
        names.pop()
    if names:
        response.headers["x-ignored-parameters"] = ", ".join(names)
    return response


def unready(answer: httpx.Response | None) -> Response:
    """The response if engines are gone: one message for all that routers say. A real error keeps
    its own."""
    message = own_error(answer) if answer is not None else None
    if message is not None:
        if answers.DEAD in message:
            message = "the engine crashed while it worked on this request; it restarts"
        # Otherwise OpenAI's client would send it to the next engine.
        return JSONResponse(error_body(500, message), 500, {"x-should-retry": "false"})
    if answer is not None and answer.status_code == 500 and answers.is_json(answer):
        return failure(500, answers.FAILED)
    return failure(503, "no engine can serve this now: one crashed and restarts; try again later")


async def unknown(request: Request, error: Exception) -> Response:
    return failure(404, f"{request.method} {request.scope['path']} is not served here")


async def own_fault(request: Request, error: Exception) -> Response:
    return failure(500, "the server failed at this request; its log says how")
