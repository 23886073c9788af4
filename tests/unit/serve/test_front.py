"""The front of a disaggregated set: what it serves, and to whom.

The routers are stand-ins; the real ones are in tests/servers/test_set.py.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from stand_in_routers import BODIES, CHAT, DOWN, Routers, completion, served
from starlette.testclient import TestClient

from mixquant.serve import front
from mixquant.serve.accepted import KNOWN
from mixquant.serve.listener import Limits

EVIL: list[Any] = [{"remote_host": "evil"}, "", "x", ["a"], 5]


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
