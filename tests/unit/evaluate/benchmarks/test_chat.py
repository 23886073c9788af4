"""The client against a server over real HTTP that fails in every way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from chat_stub import Body, Drop, Refuse, Stub, serving

from mixquant.evaluate.benchmarks.chat import (
    ChatError,
    CountingChat,
    Endpoint,
    sampling,
    split_reasoning,
)
from mixquant.evaluate.tasks import Reply

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def ask(
    answer: Callable[[Body], str | dict[str, Any]], *, url: str = "", **options: Any
) -> tuple[Reply | ChatError, CountingChat, Stub]:
    """One request to a server that answers so."""
    limits = {key: options.pop(key) for key in ("retries", "timeout") if key in options}

    async def go(stub: Stub) -> tuple[Reply | ChatError, CountingChat]:
        async with Endpoint(url or stub.url, "stub", options={"top_p": 0.5}, **limits) as endpoint:
            chat = endpoint.chat()
            try:
                return await chat.ask(HELLO, **options), chat
            except ChatError as error:
                return error, chat

    with serving(Stub(answer)) as stub:
        return (*asyncio.run(go(stub)), stub)


def failing(times: int, error: Exception) -> Callable[[Body], str]:
    left = [error] * times

    def answer(body: Body) -> str:
        if left:
            raise left.pop()
        return "at last"

    return answer


def test_a_request_carries_model_messages_seed_tools_and_settings() -> None:
    reply, chat, stub = ask(lambda body: "hi", seed=3, tools=[TOOL], max_tokens=5)
    assert isinstance(reply, Reply)
    assert reply.text == "hi"
    wanted = {"model": "stub", "messages": HELLO, "seed": 3, "top_p": 0.5, "max_tokens": 5}
    assert stub.asked == [{**wanted, "tools": [TOOL]}]
    assert (chat.usage.attempts, chat.usage.prompt_tokens, chat.usage.completion_tokens) == (
        1,
        7,
        3,
    )


def test_settings_reach_vllm_by_its_names() -> None:
    options = sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=9, thinking=False)
    _, _, stub = ask(lambda body: "hi", **options)
    (body,) = stub.asked
    assert body["top_k"] == 20
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "seed" not in body
    assert "tools" not in body


@pytest.mark.parametrize("error", [Refuse(500), Refuse(503), Refuse(429), Refuse(408), Drop()])
def test_what_may_pass_is_asked_again_and_counted(error: Exception) -> None:
    times = 1 if isinstance(error, Drop) else 4
    reply, chat, stub = ask(failing(times, error))
    assert isinstance(reply, Reply)
    assert reply.text == "at last"
    assert len(stub.asked) == chat.usage.attempts == times + 1


def test_it_gives_up_in_the_end_and_says_how_often_it_tried() -> None:
    error, chat, stub = ask(failing(99, Refuse(500, "out of\nmemory")), retries=3)
    assert isinstance(error, ChatError)
    assert "out of memory" in str(error)
    assert "\n" not in str(error)
    assert not error.unreachable
    assert len(stub.asked) == error.attempts == chat.usage.attempts == 4


def test_what_will_not_pass_is_not_asked_again() -> None:
    error, _, stub = ask(failing(99, Refuse(400, "the prompt is too long")))
    assert isinstance(error, ChatError)
    assert "too long" in str(error)
    assert len(stub.asked) == error.attempts == 1


def test_a_server_that_does_not_answer_in_time_is_asked_again() -> None:
    import threading

    released = threading.Event()
    calls: list[Body] = []

    def answer(body: Body) -> str:
        calls.append(body)
        if len(calls) == 1:
            released.wait()
        return "at last"

    try:
        reply, chat, _ = ask(answer, timeout=1)
    finally:
        released.set()
    assert isinstance(reply, Reply)
    assert chat.usage.attempts == 2


def test_no_server_is_told_apart_from_one_that_refuses() -> None:
    error, _, _ = ask(lambda body: "hi", url="http://127.0.0.1:9", retries=0)
    assert isinstance(error, ChatError)
    assert error.unreachable


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_that_the_server_has_parsed(field: str) -> None:
    reply, _, _ = ask(lambda body: {"content": " 4 ", field: "2 + 2"})
    assert reply == Reply("4", reasoning="2 + 2")


def test_tool_calls_are_those_of_the_api() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    reply, _, _ = ask(lambda body: {"tool_calls": [call]}, tools=[TOOL])
    assert reply == Reply("", tool_calls=(call,))


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("4", "", "4"),
        ("<think>2 + 2</think>4", "2 + 2", "4"),
        ("\n<think>\n2 + 2\n</think>\n4", "\n2 + 2\n", "\n4"),
        ("2 + 2</think>4", "2 + 2", "4"),
        ("<think>a</think>b</think>4", "a</think>b", "4"),
        ("<think>2 + ", "2 + ", ""),
        ("<|channel>thought\n2 + 2<channel|>4", "\n2 + 2", "4"),
        ("<|channel>thought\n2 + ", "\n2 + ", ""),
        ("a < b <think", "", "a < b <think"),
    ],
)
def test_reasoning_in_the_text(text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)
