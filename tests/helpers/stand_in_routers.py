"""The front of a disaggregated set in this process, and stand-ins of its routers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.testclient import TestClient

from mixquant.serve import front

LONG = "The quick brown fox jumps over the lazy dog. " * 60
SHORT = "Why?"
Handler = Callable[[Any], Any]


@contextmanager
def served(handler: Handler, **options: Any) -> Iterator[TestClient]:
    settings = front.FrontSettings(
        **{
            "transfer": "http://transfer",
            "direct": "http://direct",
            "min_transfer_tokens": 256,
            "decode_fallback": True,
            "engine_key": "inner",
            "api_key": "outer",
            **options,
        }
    )
    upstream = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    with TestClient(front.application(settings, upstream)) as client:
        client.headers["Authorization"] = "Bearer outer"
        yield client


def metrics() -> str:
    with TestClient(front.inner_application("inner")) as inner:
        return str(inner.get("/metrics").text)


class Routers:
    """Answers by host, and remembers what was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def __call__(self, request: Any) -> Any:
        self.asked.append(request)
        answer = self.answers.get(request.url.host, 200)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, json={"from": request.url.host})
        return answer

    @property
    def hosts(self) -> list[str]:
        return [request.url.host for request in self.asked]


def completion(prompt: Any = LONG, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, **more}


CHAT = {"messages": [{"role": "user", "content": LONG}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": completion(),
    "/v1/responses": {"input": LONG},
    "/v1/messages": {**CHAT, "max_tokens": 1},
    "/tokenize": {"prompt": LONG},
    "/detokenize": {"tokens": [1]},
}
DOWN = httpx.ConnectError("refused")
PREFILL_FAILED = (
    "Transparent proxy request failed: Network error: Prefill server http://127.0.0.1:1/v1/completions "
    'returned 500 Internal Server Error: {{"error": {{"message": "{}", "code": 500}}}}'
)
PREFILL_REFUSED = (
    "Transparent proxy request failed: Network error: Prefill server http://127.0.0.1:1/v1/completions "
    "returned {}: {}"
)


class Breaking(httpx.AsyncByteStream):
    """A stream that ends before its end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"choices": []}\n\n'
        raise httpx.RemoteProtocolError("peer closed connection")
