"""What the front does when engines or routers end."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from stand_in_routers import (
    DOWN,
    PREFILL_FAILED,
    PREFILL_REFUSED,
    SHORT,
    Breaking,
    Routers,
    completion,
    metrics,
    served,
)

from mixquant.serve import attempts


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSES", [0.0] * len(attempts.PAUSES))
    # Not uvicorn's, which a server of another test sets up so that nothing of it is seen here.
    monkeypatch.setattr(attempts, "LOG", logging.getLogger("test_attempts"))


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
    assert answer.status_code == 200
    assert routers.hosts == hosts
    assert "mixquant_routed_total" in metrics()


def test_a_takeover_is_counted() -> None:
    def count() -> float:
        wanted = 'mixquant_routed_total{reason="fallback",route="direct"}'
        lines = [x for x in metrics().splitlines() if x.startswith(wanted)]
        return float(lines[0].split()[-1]) if lines else 0.0

    with served(Routers(transfer=503)) as client:
        before = count()
        client.post("/v1/completions", json=completion())
        client.post("/v1/completions", json=completion(SHORT))
        assert count() == before + 1


def test_no_decode_engine_takes_over_where_it_must_not() -> None:
    routers = Routers(transfer=503)
    with served(routers, decode_fallback=False) as client:
        answer = client.post("/v1/completions", json=completion())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert "try again later" in answer.json()["error"]["message"]
    assert routers.hosts == ["transfer"] * len(attempts.PAUSES)


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


DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def failing(message: str, of_prefill: bool) -> httpx.Response:
    if of_prefill:
        return httpx.Response(500, text=PREFILL_FAILED.format(message))
    return httpx.Response(500, json={"error": {"message": message, "code": 500}})


@pytest.mark.parametrize("of_prefill", [False, True])
@pytest.mark.parametrize("message", ["'str' object has no attribute 'get'", DEAD])
def test_what_an_engine_fails_at_is_not_shown_to_the_next_one(
    message: str, of_prefill: bool
) -> None:
    """It was alone there, so it is what the engine failed at, or died of."""
    routers = Routers(transfer=failing(message, of_prefill), direct=failing(message, False))
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion())
    assert answer.status_code == 500
    assert routers.hosts == ["transfer"]
    shown = answer.json()["error"]["message"]
    assert shown == (message if message != DEAD else shown)
    assert answer.headers["x-should-retry"] == "false"
    assert "above" not in shown
    assert "127.0.0.1" not in shown


@pytest.mark.parametrize(
    ("second", "status"), [(httpx.Response(200, json={}), 200), (failing(DEAD, False), 500)]
)
def test_what_was_beside_the_killer_of_an_engine_is_tried_again_once(
    second: Any, status: int
) -> None:
    """Which of them it was is not known; none of them may end a third engine."""
    answers = [failing(DEAD, True), failing(DEAD, True), second, second, second, second]
    asked: list[str] = []
    both = asyncio.Event()

    async def router(request: Any) -> Any:
        asked.append(request.url.host)
        if len(asked) == 2:
            both.set()
        await both.wait()
        return answers.pop(0)

    with served(router) as client, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: client.post("/v1/completions", json=completion()), range(2)))
    assert [one.status_code for one in done] == [status] * 2
    assert asked == ["transfer"] * 4


@pytest.mark.parametrize("fallback", [True, False])
def test_a_cache_that_did_not_come_is_fetched_again_where_nothing_takes_over(
    fallback: bool,
) -> None:
    lost = failing("Internal server error", False)
    routers = Routers(transfer=[lost, 200])
    with served(routers, decode_fallback=fallback) as client:
        status = client.post("/v1/completions", json=completion()).status_code
    assert (status, len(routers.asked)) == ((500, 1) if fallback else (200, 2))


def test_a_stream_is_beside_an_engines_death_until_it_ends() -> None:
    """So the request that meets the death is not taken for its cause."""
    streaming, died = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            streaming.set()
            yield b"data: a\n\n"
            await died.wait()

    async def router(request: Any) -> Any:
        asked.append(json.loads(request.content)["model"])
        if asked[-1] == "stream":
            return httpx.Response(200, stream=Stream())
        await streaming.wait()
        if len(asked) == 2:
            return failing(DEAD, True)
        died.set()
        return httpx.Response(200, json={})

    with served(router) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(
            client.post, "/v1/completions", json={**completion(stream=True), "model": "stream"}
        )
        while not streaming.is_set():
            time.sleep(0.01)
        try:
            second = client.post("/v1/completions", json=completion())
        finally:
            assert client.portal is not None
            client.portal.call(died.set)
        assert first.result(60).status_code == 200
    assert (second.status_code, asked) == (200, ["stream", "m", "m"])


def test_what_came_and_went_meanwhile_may_have_ended_an_engine() -> None:
    """The killer of an engine can be gone before the others hear of the death."""
    waiting, killed = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    async def router(request: Any) -> Any:
        asked.append(json.loads(request.content)["model"])
        if asked[-1] == "killer":
            return failing(DEAD, True) if asked.count("killer") == 1 else httpx.Response(400)
        if len(asked) == 1:
            waiting.set()
            await killed.wait()
            return failing(DEAD, True)
        return httpx.Response(200, json={})

    with served(router) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/completions", json=completion())
        while not waiting.is_set():
            time.sleep(0.01)
        try:
            client.post("/v1/completions", json={**completion(), "model": "killer"})
        finally:
            assert client.portal is not None
            client.portal.call(killed.set)
        assert first.result(60).status_code == 200
    assert asked[-1] == "m"


BROKEN_OFF = httpx.RemoteProtocolError("Server disconnected without sending a response.")


@pytest.mark.parametrize(
    "broken",
    [BROKEN_OFF, httpx.ReadError("reset"), httpx.WriteError("reset")],
    ids=lambda one: type(one).__name__,
)
def test_what_breaks_connections_off_is_not_repeated_for_ever(broken: Exception) -> None:
    routers = Routers(transfer=broken, direct=broken)
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion(SHORT)).status_code == 503
    assert routers.hosts == ["direct"] * attempts.MAX_FAULTS
    routers = Routers(transfer=broken, direct=broken)
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 503
    assert routers.hosts == ["transfer"] + ["direct"] * attempts.MAX_FAULTS
    routers = Routers(transfer=broken)
    with served(routers, decode_fallback=False) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 503
    assert routers.hosts == ["transfer"] * attempts.MAX_FAULTS


@pytest.mark.parametrize("late", [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")])
def test_a_router_that_was_not_reached_did_not_have_the_request(late: Exception) -> None:
    routers = Routers(direct=[late, late, late, 200])
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion(SHORT)).status_code == 200


def test_an_error_that_breaks_off_is_a_broken_connection() -> None:
    def broken(request: Any) -> Any:
        return httpx.Response(500, stream=Breaking())

    with served(broken) as client:
        answer = client.post("/v1/completions", json=completion(SHORT))
    assert answer.status_code == 503
    assert "try again" in answer.json()["error"]["message"]


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


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429])
def test_what_a_prefill_engine_refuses_is_refused(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"error": {"message": "a secret is too long", "type": "BadRequestError", "code": status}}
    text = PREFILL_REFUSED.format(f"{status} Whatever", json.dumps(said))
    routers = Routers(transfer=httpx.Response(500, text=text))
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion())
    assert (answer.status_code, answer.json()) == (status, said)
    assert routers.hosts == ["transfer"]
    assert "secret" not in caplog.text


def test_what_a_prefill_engine_says_otherwise_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = PREFILL_REFUSED.format("503 Service Unavailable", "a secret")
    with served(Routers(transfer=httpx.Response(500, text=text)), decode_fallback=False) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 503
    (line,) = [r.getMessage() for r in caplog.records if "attempts" in r.getMessage()]
    assert line.endswith("attempts: transfer: 500; transfer: 500")


def test_the_log_says_what_was_tried_and_nothing_of_a_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = httpx.Response(503, text="No available workers")
    engine = httpx.Response(500, json={"error": {"message": "a secret"}})
    of_prefill = httpx.Response(500, text=PREFILL_FAILED.format("a secret"))
    for last in (engine, of_prefill):
        caplog.clear()
        with served(Routers(direct=[router, DOWN, last])) as client:
            client.post("/v1/completions", json=completion(SHORT))
        (line,) = [r.getMessage() for r in caplog.records if "attempts" in r.getMessage()]
        assert line.endswith("direct: 503 No available workers; direct: ConnectError; direct: 500")
