"""The front of a disaggregated set: which way each request goes, and what is done when it is blocked.

The routers are stand-ins; the real ones are in test_serve_real.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mixquant.serve import front

LONG = "The quick brown fox jumps over the lazy dog. " * 60
SHORT = "Why?"
Handler = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "PAUSES", [0.0] * len(front.PAUSES))


@contextmanager
def served(handler: Handler, **options: Any) -> Iterator[TestClient]:
    settings = front.Settings(
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


@pytest.mark.parametrize(
    ("path", "body", "host"),
    [
        ("/v1/completions", completion(), "transfer"),
        ("/v1/completions", completion(SHORT), "direct"),
        ("/v1/completions", completion([7] * 300), "transfer"),
        ("/v1/completions", completion([7] * 255), "direct"),
        ("/v1/completions", completion([[7] * 300]), "transfer"),
        ("/v1/completions", completion([LONG]), "transfer"),
        ("/v1/completions", completion([LONG, LONG]), "direct"),
        ("/v1/completions", completion(n=2), "direct"),
        ("/v1/completions", completion(n=1), "transfer"),
        ("/v1/completions", completion(echo=True), "direct"),
        ("/v1/completions", completion(prompt_logprobs=0), "direct"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "transfer"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SHORT}]}, "direct"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": SHORT}], "tools": [{"description": LONG}]},
            "transfer",
        ),
    ],
)
def test_which_way(path: str, body: dict[str, Any], host: str) -> None:
    routers = Routers()
    with served(routers) as client:
        answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, {"from": host})
    (asked,) = routers.asked
    assert asked.url.path == path
    assert json.loads(asked.content) == body
    assert asked.headers["authorization"] == "Bearer inner"


@given(text=st.text(), least=st.integers(0, 50))
def test_an_estimate_is_never_negative_and_zero_sends_everything(text: str, least: int) -> None:
    body = completion(text)
    assert front.estimated_tokens(body) >= 0
    assert front.route_of(body, 0)[0] == "transfer"
    way = front.route_of(body, least)[0]
    assert way == ("transfer" if front.estimated_tokens(body) >= least else "direct")


def test_a_client_does_not_say_where_a_cache_comes_from() -> None:
    routers = Routers()
    with served(routers) as client:
        client.post("/v1/completions", json=completion(kv_transfer_params={"remote_host": "evil"}))
    assert "kv_transfer_params" not in json.loads(routers.asked[0].content)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "outer", "Bearer inner", "Bearer é"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/tokenize"])
def test_without_the_key_nothing_is_asked(header: str | None, path: str) -> None:
    routers = Routers()
    with served(routers) as client:
        del client.headers["Authorization"]
        headers = {} if header is None else {"Authorization": header.encode()}
        method = "GET" if path == "/v1/models" else "POST"
        answer = client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert routers.asked == []


def test_without_a_key_anyone_may_ask() -> None:
    with served(Routers(), api_key=None) as client:
        del client.headers["Authorization"]
        assert client.post("/v1/completions", json=completion()).status_code == 200


def test_the_routers_can_ask_about_their_key() -> None:
    with served(Routers()) as client:
        for key, status in (("inner", 200), ("outer", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.get("/internal/key-check", headers=headers).status_code == status


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b'{"a": NaN}', b"[" * 10**5])
def test_what_is_no_request(content: bytes) -> None:
    routers = Routers()
    with served(routers) as client:
        answer = client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
    assert routers.asked == []


def test_what_is_not_served() -> None:
    routers = Routers()
    with served(routers) as client:
        for method, path in (("POST", "/add_worker"), ("GET", "/v1/completions"), ("GET", "/x")):
            answer = client.request(method, path)
            assert answer.status_code == 404
            assert path in answer.json()["error"]["message"]
    assert routers.asked == []


# --- when engines end --------------------------------------------------------------------------------

DOWN = httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("transfer", "hosts"),
    [
        (503, ["transfer", "direct"]),  # no prefill engine is left
        (DOWN, ["transfer", "direct"]),  # no router
        ([500, 200], ["transfer", "transfer"]),  # a prefill engine died; there is another one
        ([500, 500], ["transfer", "transfer", "direct"]),
        ([500, 503], ["transfer", "transfer", "direct"]),
    ],
)
def test_a_decode_engine_takes_over(transfer: Any, hosts: list[str]) -> None:
    routers = Routers(transfer=transfer)
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion())
        metrics = client.get("/metrics").text
    assert answer.status_code == 200
    assert routers.hosts == hosts
    assert "mixquant_routed_total" in metrics


def test_a_takeover_is_counted() -> None:
    def count(client: TestClient) -> float:
        wanted = 'mixquant_routed_total{reason="fallback",route="direct"}'
        lines = [x for x in client.get("/metrics").text.splitlines() if x.startswith(wanted)]
        return float(lines[0].split()[-1]) if lines else 0.0

    with served(Routers(transfer=503)) as client:
        before = count(client)
        client.post("/v1/completions", json=completion())
        client.post("/v1/completions", json=completion(SHORT))
        assert count(client) == before + 1


def test_no_decode_engine_takes_over_where_it_must_not() -> None:
    routers = Routers(transfer=503)
    with served(routers, decode_fallback=False) as client:
        answer = client.post("/v1/completions", json=completion())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert "try again later" in answer.json()["error"]["message"]
    assert routers.hosts == ["transfer"] * len(front.PAUSES)


@pytest.mark.parametrize("trouble", [[503, 503, 200], [DOWN, 503, DOWN, 200], [500, 200]])
def test_a_takeover_has_attempts_of_its_own(trouble: list[Any]) -> None:
    # A decode engine of a busy machine can pass for dead for a moment.
    routers = Routers(transfer=[500, 503], direct=list(trouble))
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 200
    assert routers.hosts == ["transfer"] * 2 + ["direct"] * len(trouble)


def test_what_engines_may_have_died_of_is_not_shown_to_all_of_them() -> None:
    routers = Routers(transfer=500, direct=500)
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 500
    assert routers.hosts == ["transfer"] * 2 + ["direct"] * 2


def test_the_log_says_what_was_tried_and_nothing_of_a_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = httpx.Response(503, text="No available workers")
    engine = httpx.Response(500, json={"error": {"message": "a secret"}})
    answers = [router, DOWN, engine, httpx.Response(500, json={})]
    with served(Routers(direct=answers)) as client:
        client.post("/v1/completions", json=completion(SHORT))
    (line,) = [r.getMessage() for r in caplog.records if "no engine served" in r.getMessage()]
    wanted = "direct: 503 No available workers; direct: ConnectError; direct: 500; direct: 500"
    assert line.endswith(wanted)


@pytest.mark.parametrize("fault", [500, 503, DOWN])
def test_when_nothing_is_left_the_client_is_told(fault: Any) -> None:
    text = httpx.Response(fault, text="Transparent proxy failed") if fault == 503 else fault
    with served(Routers(transfer=fault, direct=text)) as client:
        answer = client.post("/v1/completions", json=completion(SHORT))
    assert answer.status_code == (500 if fault == 500 else 503)
    assert "error" in answer.json() or answer.json() == {"from": "direct"}


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_mistake_of_the_client_is_not_tried_again(status: int) -> None:
    routers = Routers(transfer=status)
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion())
    assert (answer.status_code, routers.hosts) == (status, ["transfer"])


class Breaking(httpx.AsyncByteStream):
    """A stream that ends before its end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"choices": []}\n\n'
        raise httpx.RemoteProtocolError("peer closed connection")


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    stream = httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Breaking())
    with served(Routers(transfer=stream)) as client:
        answer = client.post("/v1/completions", json=completion(stream=True))
    assert answer.headers["content-type"] == "text/event-stream"
    first, last = answer.text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {"choices": []}
    assert "try again" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_an_answer_that_breaks_off_is_an_error() -> None:
    broken = httpx.Response(200, headers={"content-type": "application/json"}, stream=Breaking())
    with served(Routers(transfer=broken)) as client:
        answer = client.post("/v1/completions", json=completion())
    assert answer.status_code == 502
    assert "try again" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("transfer", "direct", "fallback", "healthy", "whole"),
    [
        (200, 200, True, 200, 200),
        (503, 200, True, 200, 503),
        (503, 200, False, 503, 503),
        (200, 503, True, 503, 503),
        (200, DOWN, True, 503, 503),
    ],
)
def test_health(transfer: Any, direct: Any, fallback: bool, healthy: int, whole: int) -> None:
    with served(Routers(transfer=transfer, direct=direct), decode_fallback=fallback) as client:
        del client.headers["Authorization"]
        assert client.get("/health").status_code == healthy
        assert client.get("/ready").status_code == whole


# --- sessions ----------------------------------------------------------------------------------------


def session(body: dict[str, Any], **headers: str) -> str | None:
    routers = Routers()
    with served(routers) as client:
        client.post("/v1/chat/completions", json=body, headers=headers)
    return routers.asked[0].headers.get("x-session-id")


def test_the_turns_of_a_conversation_have_one_session() -> None:
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": LONG}]
    later = [*first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    other = [system, {"role": "user", "content": "other"}]
    assert session({"messages": first}) == session({"messages": later}) is not None
    assert session({"messages": first}) != session({"messages": other})
    assert session({"messages": first}, **{"x-session-id": "own"}) == "own"
    assert session({"messages": first, "user": "u"}) == session({"messages": other, "user": "u"})
