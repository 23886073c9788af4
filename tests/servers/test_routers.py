"""The real routers and the real front over stand-ins for engines: what reaches which engine."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mixquant.serve.addresses import local_addresses
from mixquant.serve.commands import processes
from mixquant.serve.description import Deployment

pytest.importorskip("vllm_router")

PATIENCE = 120  # s, for what takes a moment
LONG = "The quick brown fox jumps over the lazy dog. " * 60


@dataclass
class Engine:
    """Remembers what it is asked, and answers like an engine that has finished."""

    name: str
    port: int
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                engine.asked.append(body)
                engine.keys.add(self.headers["authorization"])
                self.answer({"kv_transfer_params": {"remote_engine_id": engine.name}})

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Set:
    url: str
    engines: dict[str, Engine]

    def chat(self, messages: Any, **more: Any) -> list[str]:
        """The engines that one request reached, in order of their names."""
        return self.reached("chat/completions", {"messages": messages, **more})

    def reached(self, path: str, body: dict[str, Any]) -> list[str]:
        before = {name: len(engine.asked) for name, engine in self.engines.items()}
        request = urllib.request.Request(
            f"{self.url}/v1/{path}",
            json.dumps({"model": "m", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert answer.status == 200
        return sorted(name for name, e in self.engines.items() if len(e.asked) > before[name])


@pytest.fixture(scope="module")
def served() -> Iterator[Set]:
    deployment = Deployment(model="m", prefill=2, decode=2, port=_port())
    started = processes(deployment, local_addresses(deployment), gpus=[])
    engines = {
        one.name: Engine(one.name, one.address.port)
        for one in started
        if one.role in ("prefill", "decode")
    }
    running = [
        subprocess.Popen(
            one.argv,
            env={**os.environ, **one.environment, **dict.fromkeys(one.secrets, "inner")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in started
        if one.role in ("router", "front")
    ]
    url = started[-1].address.url
    try:
        end = time.monotonic() + PATIENCE
        while not _answers(f"{url}/ready"):
            assert time.monotonic() < end
            assert all(one.poll() is None for one in running)
            time.sleep(0.1)
        yield Set(url, engines)
    finally:
        for one in running:
            one.kill()
            one.wait()
        for engine in engines.values():
            engine.end()


def _port() -> int:
    from mixquant.servers.ports import free_ports

    return free_ports(1)[0]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("number", range(6))
def test_a_conversation_keeps_its_engines_whichever_way_it_goes(served: Set, number: int) -> None:
    messages = [{"role": "user", "content": f"Question {number}?"}]
    (decode,) = served.chat(messages)  # short
    assert decode.startswith("decode")
    messages += [{"role": "assistant", "content": LONG}, {"role": "user", "content": "And?"}]
    first, second = served.chat(messages)
    assert first == decode
    assert second.startswith("prefill")
    messages += [{"role": "assistant", "content": LONG}, {"role": "user", "content": "So?"}]
    assert served.chat(messages) == [first, second]


def test_conversations_are_spread(served: Set) -> None:
    reached = {
        name
        for number in range(24)
        for name in served.chat([{"role": "user", "content": f"{number} {LONG}"}])
    }
    assert reached == set(served.engines)


def test_an_engine_is_shown_the_inner_key(served: Set) -> None:
    served.chat([{"role": "user", "content": LONG}])
    served.chat([{"role": "user", "content": "a"}])
    keys = set().union(*(engine.keys for engine in served.engines.values()))
    assert keys == {"Bearer inner"}


def test_what_a_client_asks_for_reaches_the_engine(served: Set) -> None:
    """And what the router, 0.1.17, leaves out: the documentation says so."""
    asked: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "strict": True,
                    "parameters": {"type": "object", "properties": {"z": {}, "a": {}}},
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": {"regex": "a"},
        "logit_bias": {"5": 1.5},
        "stop": ["x"],
        "seed": 1,
        "top_k": 5,
        "cache_salt": "s",
        "max_tokens": 7,
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": LONG}]},
        {"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "b"},
        {"role": "user", "content": "c", "name": "d"},
    ]
    first, second = served.chat(messages, **asked)
    decode, prefill = (served.engines[name].asked[-1] for name in (first, second))
    assert prefill.pop("max_tokens") == 1
    assert prefill.pop("kv_transfer_params")["do_remote_decode"] is True
    assert decode.pop("max_tokens") == asked.pop("max_tokens")
    assert decode.pop("kv_transfer_params") == {"remote_engine_id": second}
    del messages[1]["reasoning_content"]
    del asked["tools"][0]["function"]["strict"]
    for body in (prefill, decode):
        assert body["messages"] == messages
        assert {key: body[key] for key in asked} == asked


def test_prompts_of_token_ids(served: Set) -> None:
    """What load generators send."""
    for count, role in ((2000, ["decode", "prefill"]), (100, ["decode"])):
        prompt = list(range(1, count + 1))
        reached = served.reached("completions", {"prompt": prompt, "max_tokens": 1})
        assert [name.partition("-")[0] for name in reached] == role
        assert all(served.engines[name].asked[-1]["prompt"] == prompt for name in reached)


def test_without_one_prefill_engine_the_other_reads_all(served: Set) -> None:
    """The last one: an engine is gone afterwards."""
    gone = served.engines["prefill-0"]
    gone.end()
    for number in range(12):
        _, prefill = served.chat([{"role": "user", "content": f"once more {number} {LONG}"}])
        assert prefill == "prefill-1"
