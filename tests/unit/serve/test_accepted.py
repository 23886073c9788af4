"""What of a request reaches an engine: the list of parameters, held against vLLM's, and any JSON."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from example_counts import up_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mixquant.serve import accepted as module
from mixquant.serve import front
from mixquant.serve.accepted import KNOWN, Refused, accepted

# Not passed on: where caches come from, arguments of extensions, ids that are ours to give, Python
# objects in disguise, arguments of processors, and what is for vLLM's own renderers alone.
LEFT_OUT = {
    "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "request_id", "session_id",
    "prompt_embeds", "mm_processor_kwargs", "media_io_kwargs", "mm_payload", "return_mm_kwargs",
    "routed_experts_prompt_start", "return_token_offsets", "previous_input_messages", "prompt",
}  # fmt: skip


def test_every_parameter_of_vllms_is_decided_about() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.anthropic import protocol as anthropic
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize import protocol as tokenize

    theirs = {
        "/v1/chat/completions": [ChatCompletionRequest],
        "/v1/completions": [CompletionRequest],
        "/v1/responses": [ResponsesRequest],
        "/v1/messages": [anthropic.AnthropicMessagesRequest],
        "/tokenize": [tokenize.TokenizeCompletionRequest, tokenize.TokenizeChatRequest],
        "/detokenize": [tokenize.DetokenizeRequest],
    }
    assert set(theirs) == set(KNOWN)
    for path, kinds in theirs.items():
        fields = {name for kind in kinds for name in kind.model_fields}
        assert fields - set(KNOWN[path]) <= LEFT_OUT, path
        assert "kv_transfer_params" not in KNOWN[path]


def test_what_is_known_is_kept_as_it_was() -> None:
    schema = {"type": "object", "properties": {"kv_transfer_params": {"enum": [{"a": None}]}}}
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [
                {"type": "text", "text": "é \U0001f600"},
                {"type": "image_url", "image_url": {"url": "data:", "detail": "low"}},
            ]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}
        },
        "structured_outputs": {"json": schema, "regex": "a"},
        "chat_template_kwargs": {"enable_thinking": False},
        "logit_bias": {"5": 1.5},
        "stop": ["a", "b"],
        "stream_options": {"include_usage": True},
        "temperature": 0.1,
        "seed": 2**62,
    }  # fmt: skip
    kept = accepted("/v1/chat/completions", json.dumps(body).encode())
    assert kept.body == body
    assert json.loads(kept.content) == body
    assert kept.left_out == ()


def test_what_is_not_known_is_left_out_at_every_depth() -> None:
    evil = {"kv_transfer_params": 1}
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", **evil}], **evil}],
        "tools": [{"type": "function", "function": {"name": "f", **evil}, **evil}],
        "tool_choice": {"type": "function", "function": {"name": "f", **evil}, **evil},
        "response_format": {"type": "text", **evil},
        "structured_outputs": {"regex": "a", **evil},
        "stream_options": {"include_usage": True, **evil},
        "repetition_detection": {"min_count": 2, **evil},
        **evil,
    }
    kept = accepted("/v1/chat/completions", json.dumps(body).encode())
    assert b"transfer" not in kept.content
    assert kept.body["tools"] == [{"type": "function", "function": {"name": "f"}}]
    name = "kv_transfer_params"
    inner: tuple[str, ...] = (
        "messages.content",
        "messages",
        "tools.function",
        "tools",
        "tool_choice.function",
    )
    inner += ("tool_choice", "response_format", "structured_outputs", "stream_options")
    inner += ("repetition_detection",)
    assert kept.left_out == (*(f"{one}.{name}" for one in inner), name)


def test_so_is_what_a_tool_gave_back() -> None:
    evil = {"kv_transfer_params": 1}
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    body = {"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "1", "content": [
            {**part, "cache_control": {"type": "ephemeral", **evil}, **evil}
        ]}
    ]}]}  # fmt: skip
    kept = accepted("/v1/messages", json.dumps(body).encode())
    (result,) = kept.body["messages"][0]["content"]
    assert result["content"] == [part]
    assert kept.left_out == (
        "messages.content.content.cache_control.kv_transfer_params",
        "messages.content.content.kv_transfer_params",
    )


RESPONSES: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": "data:", "detail": "low"},
        ]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "a"}],
         "content": [{"type": "reasoning_text", "text": "b"}], "encrypted_content": None},
        {"type": "function_call", "id": "f", "call_id": "1", "name": "f", "arguments": "{}",
         "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"type": "function_call_output", "call_id": "1",
         "output": [{"type": "input_text", "text": "r"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "c", "input": "text"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "r"},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "a", "annotations": [{"type": "url_citation", "url": "u"}],
             "logprobs": [{"token": "a", "logprob": -1.0, "bytes": [1], "top_logprobs": [
                 {"token": "b", "logprob": -2.0, "bytes": [2]}]}]}
        ]},
    ],
    "tools": [
        {"type": "function", "name": "f", "description": "d", "strict": True,
         "parameters": {"type": "object", "properties": {"kv_transfer_params": {"a": 1}}}},
        {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark",
                                                   "definition": "x"}},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "namespace", "name": "n", "description": "d", "tools": [
            {"type": "function", "name": "g", "parameters": {"type": "object"}}]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto",
                    "tools": [{"type": "function", "name": "f"}]},
}  # fmt: skip


def test_a_responses_request_is_kept_as_it_was() -> None:
    kept = accepted("/v1/responses", json.dumps(RESPONSES).encode())
    assert (kept.body, kept.left_out) == (RESPONSES, ())


@pytest.mark.parametrize("name", ["input", "tools", "tool_choice"])
def test_a_responses_request_holds_nothing_else_at_any_depth(name: str) -> None:
    def marked(value: Any, where: str = "") -> Any:
        """With a parameter more in every object that is no schema."""
        if isinstance(value, list):
            return [marked(one, where) for one in value]
        if not isinstance(value, dict) or where == "parameters":
            return value
        return {"evil": 1, **{key: marked(one, key) for key, one in value.items()}}

    kept = accepted("/v1/responses", json.dumps({name: marked(RESPONSES[name])}).encode())
    assert kept.body == {name: RESPONSES[name]}
    assert f"{name}.evil" in kept.left_out
    assert all(one.endswith(".evil") for one in kept.left_out)


@pytest.mark.parametrize("name", ["server_url", "headers", "authorization", "connector_id"])
def test_a_client_does_not_say_where_the_tools_of_an_engine_are(name: str) -> None:
    body = {"tools": [{"type": "mcp", "server_label": "a", name: {"a": "b"}}]}
    kept = accepted("/v1/responses", json.dumps(body).encode())
    assert kept.left_out == (f"tools.{name}",)


def test_no_more_names_are_told_than_a_header_holds() -> None:
    body = {"messages": [{f"n{number}": 1 for number in range(5000)}]}
    kept = accepted("/v1/chat/completions", json.dumps(body).encode())
    assert kept.left_out == tuple(f"messages.n{number}" for number in range(module.MAX_LEFT_OUT))


@pytest.mark.parametrize("name", ["temperature", "model", "stop", "prompt"])
def test_a_value_is_no_object(name: str) -> None:
    for value in ({"a": 1}, [{"a": 1}], [[{"a": 1}]]):
        with pytest.raises(Refused, match=f"^{name} takes a value or a list of values"):
            accepted("/v1/completions", json.dumps({name: value}).encode())


@pytest.mark.parametrize("values", ["[]", "1", '{"a":1}', '""', '"\\""'])
def test_more_values_than_a_prompt_of_token_ids_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    monkeypatch.setattr(module, "MAX_VALUES", 1000)
    for count, refused in ((400, False), (1001, True)):
        content = f'{{"logit_bias":[{",".join([values] * count)}]}}'.encode()
        if refused:
            with pytest.raises(Refused, match="more than 1000 values") as raised:
                accepted("/v1/completions", content)
            assert raised.value.status == 413
        else:
            assert accepted("/v1/completions", content).content == content


@pytest.mark.parametrize("text", ["[{,", '"[', "\\[", '\\"[,{', "\\"])
def test_a_text_is_one_value_whatever_it_holds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module, "MAX_VALUES", 10)
    body = {"prompt": text * 100, "stop": [text] * 5}
    assert accepted("/v1/completions", json.dumps(body).encode()).body == body
    cut = json.dumps(body).encode()[:60]  # in a string that does not end
    with pytest.raises(Refused, match="not JSON"):
        accepted("/v1/completions", cut)


def test_a_name_given_twice_is_given_once() -> None:
    kept = accepted("/v1/completions", b'{"n": {"a": 1}, "n": 1, "vllm_xargs": 1}')
    assert kept.content == b'{"n":1}'


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@settings(max_examples=up_to(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), path=st.sampled_from(sorted(KNOWN)))
def test_whatever_is_sent_is_passed_on_or_refused(data: st.DataObject, path: str) -> None:
    """A surrogate, a number that is none, any nesting: never an error of the front's own."""
    names = st.sampled_from(sorted(KNOWN[path])) | st.text()
    body = data.draw(ANYTHING | st.dictionaries(names, ANYTHING))
    content = json.dumps(body).encode()  # as Python writes it: with NaN, and halves of pairs
    cut = data.draw(st.sampled_from([len(content), len(content) // 2]))
    passed: list[dict[str, Any]] = []

    def router(request: Any) -> Any:
        passed.append(json.loads(request.content.decode("utf-8", "strict")))
        return httpx.Response(200, json={})

    given = front.FrontSettings("http://transfer", "http://direct", 256, True, "inner", None)
    upstream = httpx.AsyncClient(transport=httpx.MockTransport(router))
    with TestClient(front.application(given, upstream), raise_server_exceptions=False) as client:
        answer = client.post(path, content=content[:cut])
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        (one,) = passed
        assert set(one) <= set(KNOWN[path])
    else:
        assert passed == []
        assert answer.json()["error"]["message"]
