"""A chat's commands, and Ctrl-C: what is sent to the model, what is not, and what ends."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
from transformers import TextStreamer

from mixquant import cli

Chat = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def chat(
    smollm2_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Chat:
    """Runs a chat on the given lines; returns standard error, and its lines on what was read."""

    def run(*lines: str, max_new_tokens: int = 4) -> tuple[str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        options = ["--recipe", "exact", "--max-new-tokens", str(max_new_tokens)]
        assert cli.main(["chat", smollm2_path, *options]) == 0
        errors = capsys.readouterr().err
        return errors, [line for line in errors.splitlines() if line.startswith("read ")]

    return run


def test_commands_are_not_sent_to_the_model(chat: Chat) -> None:
    errors, read = chat("/help", "/quit", "/help me", "/", "/exit", "Hi")
    assert read == []
    assert errors.count("/reset forgets the conversation") == 4
    for unknown in ("/quit", "/help me", "/"):
        assert f"error: unknown command '{unknown}';" in errors


def test_a_path_is_a_message(chat: Chat) -> None:
    _, read = chat("/etc/hosts holds what?")
    assert len(read) == 1


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Presses Ctrl-C as these tokens are written; 0 is the prompt."""
    put, count = TextStreamer.put, 0

    def pressed(self: Any, value: Any) -> None:
        nonlocal count
        if count in tokens:
            signal.raise_signal(signal.SIGINT)
        count += 1
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", pressed)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 2)
    errors, read = chat("Count to a hundred.", "Go on.", max_new_tokens=6)
    assert "stopped; Ctrl-C again ends the chat" in errors
    first, second = read
    assert re.search(r"; wrote [23];", first)
    prompt, wrote = map(int, re.findall(r"read (\d+) .*wrote (\d+)", first)[0])
    assert f"{prompt + wrote - 1} were cached; wrote " in second
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_ends_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 0, 1)
    _, read = chat("Count to a hundred.", "Go on.", max_new_tokens=12)
    assert read == []
    assert signal.getsignal(signal.SIGINT) == before
