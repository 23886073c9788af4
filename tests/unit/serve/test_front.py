"""The front of a disaggregated set: which way each request goes, and what is done when it is blocked.

The routers are stand-ins; the real ones are in tests/servers/test_set.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mixquant.serve import front
from mixquant.serve.accepted import KNOWN
from mixquant.serve.listener import Limits

LONG = "The quick brown fox jumps over the lazy dog. " * 60
SHORT = "Why?"
Handler = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "PAUSES", [0.0] * len(front.PAUSES))
    # Not uvicorn's, which a server of another test sets up so that nothing of it is seen here.
    monkeypatch.setattr(front, "LOG", logging.getLogger("test_front"))


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


def test_responses_go_the_way_on_which_the_router_shows_the_key() -> None:
    routers = Routers(transfer=503)
    with served(routers) as client:
        assert client.post("/v1/responses", json={"input": SHORT}).status_code == 503
    assert set(routers.hosts) == {"transfer"}


@given(text=st.text(), least=st.integers(0, 50))
def test_an_estimate_is_never_negative_and_zero_sends_everything(text: str, least: int) -> None:
    body = completion(text)
    assert front.estimated_tokens(body) >= 0
    assert front.route_of(body, 0)[0] == "transfer"
    way = front.route_of(body, least)[0]
    assert way == ("transfer" if front.estimated_tokens(body) >= least else "direct")


EVIL: list[Any] = [{"remote_host": "evil"}, "", "x", ["a"], 5]
CHAT = {"messages": [{"role": "user", "content": LONG}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": completion(),
    "/v1/responses": {"input": LONG},
    "/v1/messages": {**CHAT, "max_tokens": 1},
    "/tokenize": {"prompt": LONG},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("evil", EVIL)
def test_a_client_does_not_say_where_a_cache_comes_from(path: str, evil: Any) -> None:
    inner = {"kv_transfer_params": evil, "ec_transfer_params": evil}
    body = {**BODIES[path], **inner, "vllm_xargs": inner, "stream_options": inner}
    routers = Routers()
    with served(routers) as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200
    assert b"transfer_params" not in routers.asked[0].content
    left = answer.headers["x-ignored-parameters"].split(", ")
    inside = "stream_options.kv_transfer_params"
    nested = inside if "stream_options" in KNOWN[path] else "stream_options"
    assert {nested, "kv_transfer_params", "ec_transfer_params", "vllm_xargs"} <= set(left)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "outer", "Bearer inner", "Bearer é"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/tokenize"])
def test_without_the_key_nothing_is_asked(header: str | None, path: str) -> None:
    routers = Routers()
    with served(routers) as client:
        del client.headers["Authorization"]
        headers: Any = {} if header is None else {"Authorization": header.encode()}
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
    with TestClient(front.inner_application("inner")) as client:
        for key, status in (("inner", 200), ("outer", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.get("/internal/key-check", headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/metrics", "/internal/key-check"])
def test_what_is_not_for_clients_is_not_at_their_address(path: str) -> None:
    with served(Routers()) as client:
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b'{"a": NaN}', b"[" * 10**5])
def test_what_is_no_request(content: bytes) -> None:
    routers = Routers()
    with served(routers) as client:
        answer = client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
    assert routers.asked == []


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('"model": "\\ud800"', "surrogate"),
        ('"model": {"\\ud800": 1}', "not an object"),
        ('"user": "\\udfff", "prompt": "\\udfff", "messages": "\\udfff", '
         '"tokens": "\\udfff", "system": "\\udfff"', "surrogate"),
        ('"model": 1e400', "too large"),
        ('"model": -1e400', "too large"),
        ('"model": Infinity', "not JSON"),
        ('"model": ' + "9" * 5000, "not JSON"),
        ('"model": ' + "[" * 200 + "]" * 200, "nested"),
        ('"model": ' + "[" * 100000 + "]" * 100000, "not JSON"),
    ],
)  # fmt: skip
def test_what_no_engine_could_read_is_refused_with_a_sentence(
    path: str, more: str, said: str
) -> None:
    routers = Routers()
    content = json.dumps(BODIES[path])[:-1] + ", " + more + "}"
    with served(routers) as client:
        answer = client.post(path, content=content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", 400)
    assert routers.asked == []


@pytest.mark.parametrize("header", front.PASSED_ON)
@pytest.mark.parametrize("value", ["é".encode("latin-1"), "é".encode(), b"a\tb"])
def test_a_header_that_is_not_ascii_is_refused(header: str, value: bytes) -> None:
    routers = Routers()
    headers: Any = {header: value}
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion(), headers=headers)
    assert answer.status_code == 400
    assert header in answer.json()["error"]["message"]
    assert routers.asked == []


RUST = "Failed to deserialize the JSON body into the target type: "


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            RUST + "max_tokens: invalid value: integer `-3`, expected u32 at line 1 column 128",
            "max_tokens: invalid value: integer `-3`, expected a whole number that is not negative",
        ),
        (
            RUST + 'messages: invalid type: string "hi", expected a sequence at line 1 column 31',
            'messages: invalid type: string "hi", expected a list',
        ),
        (
            RUST + "stop: data did not match any variant of untagged enum StringOrArray at line 1 "
            "column 139",
            "stop: it has a type that is not known here",
        ),
        ("whatever http://127.0.0.1:4711 says", "the request cannot be served as it is"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_a_router_refuses_is_said_as_openai_says_it(path: str, said: str, shown: str) -> None:
    answer = httpx.Response(422, text=said)
    with served(Routers(transfer=answer, direct=answer)) as client:
        refused = client.post(path, json=BODIES[path])
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, 422)
    assert error["type"] == "invalid_request_error"
    assert shown in error["message"]
    assert "line 1" not in error["message"]
    assert "127.0.0.1" not in error["message"]


def test_what_an_engine_refuses_is_said_as_the_engine_says_it() -> None:
    said = {"error": {"message": "too long", "type": "BadRequestError", "param": "a", "code": 400}}
    with served(Routers(transfer=httpx.Response(400, json=said))) as client:
        answer = client.post("/v1/completions", json=completion())
    assert (answer.status_code, answer.json()) == (400, said)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("key", ["outer", "wrong"])
def test_a_body_that_is_too_large(path: str, key: str) -> None:
    routers = Routers()
    with served(routers, limits=Limits(body_bytes=2000)) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        sizes = {}
        for size in (2000, 2001, 100_000):
            content = json.dumps({"prompt": ""}).encode().ljust(size)
            for form in (content, iter([content[:500], content[500:]])):
                sizes[size, form is content] = client.post(path, content=form)
    for (size, _), answer in sizes.items():
        wanted = 401 if key == "wrong" else 200 if size == 2000 else 413
        assert answer.status_code == wanted
        if wanted == 413:
            assert answer.json()["error"]["message"].endswith("more than 2000 bytes")
    assert len(routers.asked) == (0 if key == "wrong" else 2)


def test_a_key_may_come_as_anthropics_clients_show_it() -> None:
    with served(Routers()) as client:
        del client.headers["Authorization"]
        for key, status in (("outer", 200), ("wrong", 401)):
            answer = client.post("/v1/messages", json=CHAT, headers={"x-api-key": key})
            assert answer.status_code == status


def test_an_answer_does_not_show_inner_addresses() -> None:
    inner = "___prefill_addr_127.0.0.1:65181___decode_addr_[::1]:13172_" + "0a" * 16
    said = {
        "id": f"chatcmpl-{inner}",
        "text": 'he said "___prefill_addr_x"',
        "n": [f"cmpl-{inner}-0"],
    }
    shown = {**said, "id": "chatcmpl-" + "0a" * 16, "n": ["cmpl-" + "0a" * 16 + "-0"]}
    with served(Routers(transfer=httpx.Response(200, json=said))) as client:
        assert client.post("/v1/completions", json=completion()).json() == shown

    line = f"data: {json.dumps(said)}\n\n".encode()

    class Cut(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for start in range(0, 2 * len(line), 7):
                yield (line + line)[start : start + 7]

    stream = httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Cut())
    with served(Routers(transfer=stream)) as client:
        answer = client.post("/v1/completions", json=completion(stream=True))
    events = answer.text.split("\n\n")
    assert [json.loads(one.removeprefix("data: ")) for one in events[:-1]] == [shown, shown]


def test_the_list_of_models_does_not_show_paths() -> None:
    said = {
        "object": "list",
        "data": [{"id": "m", "object": "model", "owned_by": "vllm", "root": "/secret/path",
                  "parent": None, "max_model_len": 8, "permission": [{"id": "p"}]}],
    }  # fmt: skip
    routers = Routers(direct=httpx.Response(200, json=said))
    with served(routers) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert client.head("/v1/models").status_code == 200
    assert [one.method for one in routers.asked] == ["GET", "GET"]
    with served(Routers(direct=httpx.Response(200, json=5))) as client:
        assert client.get("/v1/models").status_code == 503
    assert model == {
        "id": "m", "object": "model", "owned_by": "vllm", "root": "m", "max_model_len": 8
    }  # fmt: skip


def test_what_is_not_served() -> None:
    routers = Routers()
    with served(routers) as client:
        for method, path in (
            ("POST", "/add_worker"),
            ("GET", "/v1/completions"),
            ("GET", "/x"),
            ("GET", "/v1/models/"),
            ("POST", "/tokenize/"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 404
            assert path in answer.json()["error"]["message"]
    assert routers.asked == []


@pytest.mark.parametrize("host", ["x/add_worker?", "x/v1/completions?a=", "a@b", "[::1"])
def test_a_host_header_does_not_say_what_is_asked_for(host: str) -> None:
    routers = Routers(direct=httpx.Response(200, json={"data": []}))
    with served(routers) as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        assert client.post("/tokenize", json={}, headers={"Host": host}).status_code == 200
    assert [one.url.path for one in routers.asked] == ["/v1/models", "/tokenize"]


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


PREFILL_FAILED = (
    "Transparent proxy request failed: Network error: Prefill server http://127.0.0.1:1/v1/completions "
    'returned 500 Internal Server Error: {{"error": {{"message": "{}", "code": 500}}}}'
)
PREFILL_REFUSED = (
    "Transparent proxy request failed: Network error: Prefill server http://127.0.0.1:1/v1/completions "
    "returned {}: {}"
)
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
    assert routers.hosts == ["direct"] * front.MOST_FAULTS
    routers = Routers(transfer=broken, direct=broken)
    with served(routers) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 503
    assert routers.hosts == ["transfer"] + ["direct"] * front.MOST_FAULTS
    routers = Routers(transfer=broken)
    with served(routers, decode_fallback=False) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 503
    assert routers.hosts == ["transfer"] * front.MOST_FAULTS


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
