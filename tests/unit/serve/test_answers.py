"""What clients see of the answers of routers and engines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from stand_in_routers import BODIES, Breaking, Routers, completion, served

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
