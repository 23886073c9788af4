"""Which route each request takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in_routers import LONG, SHORT, Routers, completion, served

from mixquant.serve import attempts, routes


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSES", [0.0] * len(attempts.PAUSES))


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
    assert routes.estimated_prompt_tokens(body) >= 0
    assert routes.route_of(body, 0)[0] == "transfer"
    way = routes.route_of(body, least)[0]
    assert way == ("transfer" if routes.estimated_prompt_tokens(body) >= least else "direct")


@pytest.mark.parametrize("header", routes.PASSED_ON)
@pytest.mark.parametrize("value", ["é".encode("latin-1"), "é".encode(), b"a\tb"])
def test_a_header_that_is_not_ascii_is_refused(header: str, value: bytes) -> None:
    routers = Routers()
    headers: Any = {header: value}
    with served(routers) as client:
        answer = client.post("/v1/completions", json=completion(), headers=headers)
    assert answer.status_code == 400
    assert header in answer.json()["error"]["message"]
    assert routers.asked == []


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
