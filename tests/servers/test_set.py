"""`mixquant serve` with real engines, routers and NIXL, as users run it, and OpenAI's client.

One set of one prefill and one decode engine serves the whole module, in the order of the file: what is
killed comes late, the end of the set last.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import pytest
import this_machine
import tiny_models
from transformers import AutoTokenizer
from vllm_engines import ON_GPU, require_vllm

from mixquant.serve import checks
from mixquant.serve.description import Deployment, ServeError
from mixquant.serve.orphans import members, shared_memory
from mixquant.servers.ports import free_ports

require_vllm()
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="expects engines on a CPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
try:
    checks.check_packages(Deployment(model="m", prefill=1, decode=1))
except ServeError as error:
    pytest.skip(str(error), allow_module_level=True)

PATIENCE = 900  # s, for what takes seconds: a busy machine is slow, and only a hang is a fault
KEY = "the-key-of-the-clients"
CONTEXT = 2048
BLOCKS = 80  # of 128 tokens: a hundred requests want more than twice as many
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "\n".join(topics.values())


@dataclass
class Served:
    """A running set, from outside."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.client_with(KEY)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client_with(self, key: str) -> Any:
        # No retries: what the client sees is what is tested.
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE
        )

    def output(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    def children(self) -> list[Any]:
        return list(psutil.Process(self.process.pid).children())

    def child(self, mark: str) -> Any:
        """The process of ours whose command line, or title, has this in it."""
        found = [one for one in self.children() if mark in " ".join(one.cmdline())]
        assert len(found) == 1, (mark, [one.cmdline() for one in self.children()])
        return found[0]

    def engine(self, role: str) -> Any:
        return self.child(f'"role":"{role}"')

    def metrics(self, role: str | None = None) -> dict[str, float]:
        """Of the front, or of an engine; without what vLLM labels engines and models with."""
        return self.metrics_of(None if role is None else self.engine(role))

    def metrics_of(self, engine: Any) -> dict[str, float]:
        line = (engine or self.child("alone.py front")).cmdline()
        if engine is not None:
            port = int(line[line.index("--port") + 1])
        else:
            port = int(line[line.index("--inner") + 1].rpartition(":")[2])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as page:
            lines = page.read().decode().splitlines()
        found = {}
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[re.sub(r'(engine|model_name)="[^"]*",?', "", name)] = float(value)
        return found

    def routed(self, reason: str) -> float:
        return sum(
            value
            for name, value in self.metrics().items()
            if name.startswith("mixquant_routed_total") and f'reason="{reason}"' in name
        )

    def whole(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.2)

    def at_rest(self) -> None:
        """No request is left on an engine."""
        for role in ("prefill", "decode"):
            names = [f"vllm:num_requests_{what}{{}}" for what in ("running", "waiting")]
            self.wait(lambda r=role, n=names: [self.metrics(r)[x] for x in n] == [0, 0])  # type: ignore[misc]

    def is_well(self) -> None:
        """The set is whole, and sends KV caches.

        Engines that meet for the first time have five seconds to shake hands, which a busy machine
        may not have: then the decode engine reads the prompt by itself.
        """
        self.wait(self.whole)
        before = self.sent()

        def sends() -> bool:
            assert self.complete(TEXT[7000:9000], max_tokens=2).usage.completion_tokens == 2
            return self.sent() > before

        self.wait(sends)

    def sent(self) -> float:
        """KV caches that the decode engine fetched."""
        return self.metrics("decode")["vllm:nixl_bytes_transferred_count{}"]

    def complete(self, prompt: Any, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 8, **options}
        return self.client.completions.create(model="tiny", prompt=prompt, **options)

    def chat(self, messages: Any, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 8, **options}
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Engines that are pinned to the same cores, and wait actively, starve each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "UCX_TLS": "tcp,self",
        "MIXQUANT_TEST_KEY": KEY,
        "MIXQUANT_TRACEBACK": "1",
    }


@pytest.fixture(scope="module")
def model(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that costs nothing: random, of two layers, with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.save_pretrained(folder)
    changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    changes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    changes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2 * CONTEXT}
    tiny_models.build("llama", **changes).bfloat16().save_pretrained(folder)
    return str(folder)


def colocated(model: str, port: int, folder: Path) -> list[str]:
    line = [sys.executable, "-m", "mixquant.cli", "serve", model, "--port", str(port)]
    line += ["--served-model-name", "tiny", *this_machine.RECIPE_OPTION]
    return [*line, "--logs", str(folder / "logs"), "--api-key-variable", "MIXQUANT_TEST_KEY"]


def command(model: str, port: int, folder: Path, prefill: int = 1) -> list[str]:
    line = [*colocated(model, port, folder), "--prefill", str(prefill), "--decode", "1"]
    line += ["--min-transfer-tokens", "100", "--"]
    line += ["--max-model-len", str(CONTEXT), "--enforce-eager", "--num-gpu-blocks-override"]
    return [*line, str(BLOCKS)]


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    (port,) = free_ports(1)
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command(model, port, folder), stdout=log, stderr=subprocess.STDOUT, env=environment()
        )
    one = Served(process, port, folder)
    try:
        one.wait(lambda: "ready: " in one.output())
        one.is_well()
        yield one
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()  # which the engines notice


# --- answers -----------------------------------------------------------------------------------------


def test_one_line_says_that_it_is_ready(served: Served) -> None:
    ready = [line for line in served.output().splitlines() if line.startswith("ready: ")]
    assert ready == [
        f"ready: {served.url}/v1 serves tiny with 1 prefill and 1 decode engines "
        f"(logs: {served.folder / 'logs'})"
    ]
    assert [one.id for one in served.client.models.list()] == ["tiny"]
    assert served.whole()


def test_a_long_prompt_is_read_by_one_engine_and_answered_by_the_other(served: Served) -> None:
    def rows(role: str) -> dict[tuple[str, str], float]:
        found = served.metrics(role)
        return {
            (phase, precision): found[
                f'mixquant_rows_total{{phase="{phase}",precision="{precision}"}}'
            ]
            for phase in ("prefill", "decode")
            for precision in ("quantized", "precise")
        }

    def change(role: str, before: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
        return {key: value - before[key] for key, value in rows(role).items()}

    served.at_rest()
    prefill, decode, sent = rows("prefill"), rows("decode"), served.sent()
    done = served.complete(TEXT[:3000], max_tokens=6, extra_body={"ignore_eos": True})
    assert done.usage.completion_tokens == 6
    served.at_rest()
    assert served.sent() == sent + 1
    read = change("prefill", prefill)
    assert read["prefill", "quantized"] == done.usage.prompt_tokens
    assert read["prefill", "precise"] == 0
    written = change("decode", decode)
    # The prompt's last token, and each of the answer but for the last.
    assert written["prefill", "precise"] == 1
    assert written["decode", "precise"] == 5
    assert written["prefill", "quantized"] == written["decode", "quantized"] == 0


def test_a_short_prompt_is_not_sent(served: Served) -> None:
    sent, short = served.sent(), served.routed("short")
    answer = served.chat(FRANCE)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens == 37
    assert (served.sent(), served.routed("short")) == (sent, short + 1)


def long_chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{topics['assert']}\n\n{question}"}]


def test_a_stream_says_what_an_answer_says(served: Served) -> None:
    messages = long_chat("Which statement is this?")
    # Many: vLLM joins what it has not sent yet, and on a busy machine that was all of twelve.
    options = {"max_tokens": 200, "extra_body": {"cache_salt": "stream", "ignore_eos": True}}
    chunks = list(
        served.chat(messages, stream=True, stream_options={"include_usage": True}, **options)
    )
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    assert len(pieces) > 1, "it came in one piece"
    assert chunks[-1].usage.completion_tokens == 200
    whole = served.chat(messages, **options)
    assert whole.choices[0].message.content == "".join(pieces)


def test_logprobs(served: Served) -> None:
    answer = served.chat(long_chat("What is it?"), logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    done = served.complete(TEXT[:2000], logprobs=2)
    assert len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens


def test_several_answers_and_several_prompts(served: Served) -> None:
    several = served.routed("several_sequences")
    answers = served.chat(long_chat("What?"), n=3, temperature=1, seed=1)
    assert len({choice.index for choice in answers.choices}) == 3
    done = served.complete([TEXT[:900], TEXT[3000:3900]], n=2, temperature=1)
    assert len(done.choices) == 4
    assert served.routed("several_sequences") == several + 2


def test_stop_strings(served: Served) -> None:
    free = served.complete(TEXT[:2500], max_tokens=24).choices[0].text
    stop = free[8:12]
    done = served.complete(TEXT[:2500], max_tokens=24, stop=[stop])
    assert done.choices[0].text == free[: free.index(stop)]
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["auto", "required", {"name": "look_up"}])
def test_tool_calls(served: Served, choice: Any) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": topics["assert"][:800],
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "maxLength": 8}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    answer = served.chat(FRANCE, tools=[tool], tool_choice=choice, max_tokens=64)
    message = answer.choices[0].message
    if choice == "auto":
        assert message.content
    elif message.tool_calls:
        assert {call.function.name for call in message.tool_calls} == {"look_up"}
    else:  # it ended in the middle of a call, which vLLM gives as text
        assert answer.choices[0].finish_reason == "length"
        assert '{"name": "look_up"' in message.content


def test_a_conversation_computes_again_only_what_is_new(served: Served) -> None:
    """The decode engine keeps its own keys and values; the prefill engine has never seen them."""
    served.at_rest()
    messages = long_chat("Which statement does this text describe?")
    first = served.chat(messages, max_tokens=40, extra_body={"ignore_eos": True})
    served.at_rest()
    hits, cached = "vllm:prefix_cache_hits_total{}", "vllm:prefix_cache_queries_total{}"
    before = {role: served.metrics(role) for role in ("prefill", "decode")}
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Give an example."},
    ]
    second = served.chat(messages)
    served.at_rest()
    for role in ("prefill", "decode"):
        after = served.metrics(role)
        assert after[cached] > before[role][cached]
        found = after[hits] - before[role][hits]
        assert first.usage.prompt_tokens // 128 * 128 <= found < second.usage.prompt_tokens, role


def test_an_agent_learns_what_was_cached_and_no_address(served: Served) -> None:
    messages = long_chat("Which statement comes first?")
    for cached in (0, 128):
        answer = served.chat(messages, extra_body={"cache_salt": "agent"})
        assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= cached
        assert re.fullmatch(r"chatcmpl-[0-9a-f]+", answer.id)
    ids = {chunk.id for chunk in served.chat(messages, stream=True)}
    assert len(ids) == 1
    assert re.fullmatch(r"chatcmpl-[0-9a-f]+", ids.pop())
    models = served.client.models.list().to_json()
    assert "/" not in models.replace("https://", "")
    served.at_rest()


def test_responses(served: Served) -> None:
    sent = served.sent()
    asked = {"model": "tiny", "input": long_chat("What is it?"), "temperature": 0}
    answer = served.client.responses.create(max_output_tokens=8, **asked)
    assert answer.output_text
    assert answer.usage.output_tokens <= 8
    events = list(served.client.responses.create(max_output_tokens=8, stream=True, **asked))
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == answer.output_text
    assert b"127.0.0.1" not in json.dumps([one.to_dict() for one in events]).encode()
    assert served.sent() > sent


def test_anthropics_client(served: Served) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0, timeout=PATIENCE)
    asked = {"model": "tiny", "max_tokens": 8, "messages": long_chat("What is it?")}
    answer = client.messages.create(**asked)
    assert answer.content[0].text
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream)
    wrong = anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(**asked)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]


def test_litellm(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be downloaded
    litellm = pytest.importorskip("litellm")
    asked: dict[str, Any] = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": KEY}
    asked |= {"messages": FRANCE, "max_tokens": 8, "temperature": 0, "tools": TOOLS}
    answer = litellm.completion(**asked)
    chunks = list(litellm.completion(stream=True, **asked))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert answer.choices[0].message.content == "".join(pieces) != ""
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**(asked | {"temperature": -1}))


def test_openais_agents(served: Served) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)

    @agents.function_tool
    def look_up(word: str) -> str:
        """Looks a word up."""
        return word

    agent = agents.Agent(
        name="agent",
        instructions="Be brief.",
        tools=[look_up],
        model=agents.OpenAIChatCompletionsModel(model="tiny", openai_client=client),
        model_settings=agents.ModelSettings(max_tokens=8, temperature=0),
    )
    result = agents.Runner.run_sync(agent, "What is the capital of France?")
    assert result.final_output
    assert result.context_wrapper.usage.output_tokens > 0


@pytest.mark.slow
def test_guidellm(served: Served, model: str, tmp_path: Path) -> None:
    python = Path(sys.prefix) / "guidellm" / "bin" / "python"
    if not python.exists():
        pytest.skip("guidellm is not installed (see the Makefile)")
    results = tmp_path / "results.json"
    command = [str(python), "-m", "guidellm", "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={served.url},model=tiny,api_key={KEY}"]
    command += [
        "--profile",
        "kind=concurrent,streams=2",
        "--constraint",
        "kind=max_requests,count=4",
    ]
    command += ["--tokenizer", f"kind=huggingface_auto,model={model}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8"]
    command += ["--output", f"kind=json,path={results}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads(results.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)
    assert all(one["output_tokens"] == 8 for one in benchmark["requests"]["successful"])


# --- what cannot be answered -------------------------------------------------------------------------


def test_a_wrong_key(served: Served) -> None:
    for key in ("wrong", "", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
            served.client_with(key or "none").models.list()


def test_engines_and_routers_answer_the_front_alone(served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    asked = set()
    for one in served.children():
        for connection in one.net_connections("tcp"):
            if connection.status != "LISTEN" or connection.laddr.port == served.port:
                continue
            assert connection.laddr.ip == "127.0.0.1", one.cmdline()
            url = f"http://127.0.0.1:{connection.laddr.port}/v1/completions"
            for key in (KEY, "wrong"):
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
                request = urllib.request.Request(url, body, headers)
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        # A router's page of metrics, whatever the path.
                        assert answer.read().startswith(b"# "), one.cmdline()
                except urllib.error.HTTPError as error:
                    if one == served.child("alone.py front"):
                        assert error.code == 404, url  # its metrics, and what routers ask of it
                        continue
                    assert error.code == 401, url
                    asked.add(connection.laddr.port)
                except (OSError, http.client.HTTPException):
                    continue  # a side channel, which speaks no HTTP
    assert len(asked) == 4  # two engines, two routers


def test_no_key_is_seen(served: Served) -> None:
    keys = {KEY}
    for one in served.children():
        own = one.environ()
        keys |= {own[name] for name in ("VLLM_API_KEY", "MIXQUANT_ENGINE_KEY") if name in own}
    assert len(keys) == 2
    family = [psutil.Process(served.process.pid)]
    lines = [" ".join(one.cmdline()) for one in [*family, *family[0].children(recursive=True)]]
    texts = [log.read_text(errors="replace") for log in (served.folder / "logs").iterdir()]
    for text in (*lines, *texts, served.output()):
        assert not any(key in text for key in keys)


def test_mistakes_of_clients(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        served.complete(TEXT[:40_000])
    with pytest.raises(openai.BadRequestError):
        served.complete(TEXT[:2000], temperature=-1)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.completions.create(model="other", prompt=TEXT[:2000], max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        served.client.embeddings.create(model="tiny", input="a")


EVIL: list[Any] = ["", "x", ["a"], 5, {"do_remote_prefill": True, "remote_host": "evil"}]


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_what_used_to_end_an_engine_is_left_out(served: Served, prompt: str) -> None:
    engines = {role: served.engine(role).pid for role in ("prefill", "decode")}
    messages = FRANCE if prompt == "short" else long_chat("What?")
    for evil in EVIL:
        inner = {"kv_transfer_params": evil}
        answer = served.chat(messages, max_tokens=2, extra_body={**inner, "vllm_xargs": inner})
        assert answer.usage.completion_tokens == 2
    assert engines == {role: served.engine(role).pid for role in ("prefill", "decode")}
    assert served.routed("fallback") == 0


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": -3},
        {"messages": "hi"},
        {"n": 1.5},
        {"temperature": "hot"},
        {"stop": 5},
        {"seed": 2**70},
        {"stop_token_ids": [2**70]},
        {"stop_token_ids": [-1]},
        {"allowed_token_ids": [2**40]},
        {"logit_bias": {"99999999": 1}},
        {"logit_bias": {"a": "b"}},
        {"top_logprobs": 10**9, "logprobs": True},
        {"min_tokens": 2**40},
        {"truncate_prompt_tokens": 2**62},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "x"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 5}}},
        {"tools": [{"type": "function"}]},
        {"tools": [], "tool_choice": "required"},
        {"messages": [{"role": "nobody", "content": [{"type": "thing"}]}]},
        {"chat_template": "{{"},
        {"repetition_detection": {"min_count": -1}},
        {"top_k": 2**40},
        {"priority": 2**40},
        {"bad_words": [""]},
    ],
    ids=lambda more: "-".join(more) if isinstance(more, dict) else None,
)
def test_a_mistake_is_a_clients_error_and_ends_nothing(served: Served, more: Any) -> None:
    engines = {role: served.engine(role).pid for role in ("prefill", "decode")}
    body = {"model": "tiny", "messages": FRANCE, "max_tokens": 2, **more}
    for question in (FRANCE, long_chat("What?")):
        if "messages" not in more:
            body["messages"] = question
        answer = httpx.post(
            f"{served.url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=PATIENCE,
        )
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert len(error["message"].split()) > 1
            assert "127.0.0.1" not in answer.text
    assert engines == {role: served.engine(role).pid for role in ("prefill", "decode")}


def test_a_port_that_is_taken_is_refused_at_once(
    model: str, served: Served, tmp_path: Path
) -> None:
    line = command(model, served.port, tmp_path)
    done = subprocess.run(
        line, env={**environment(), "MIXQUANT_TRACEBACK": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"error: cannot listen on port {served.port} of 127.0.0.1" in done.stderr
    assert not (tmp_path / "logs").exists()


# --- load --------------------------------------------------------------------------------------------


def crowd(
    served: Served, number: int, during: Callable[[], None] | None = None, least: int = 2
) -> list[Any]:
    """Answers or errors of requests of mixed length, sent at once; the caller may do harm meanwhile."""

    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE
        ) as client:

            async def one(index: int) -> Any:
                length = (40, 3000, 120, 900, 60)[index % 5]
                start = 37 * index
                request = {
                    "model": "tiny",
                    "prompt": TEXT[start : start + length],
                    "max_tokens": least + index % 4,
                    "temperature": 0,
                    "extra_body": {"ignore_eos": True},
                }
                try:
                    if index % 2:
                        stream = await client.completions.create(stream=True, **request)
                        tokens = [chunk async for chunk in stream if chunk.choices]
                        return len(tokens) > 0 and tokens[-1].choices[0].finish_reason
                    done = await client.completions.create(**request)
                    return done.choices[0].finish_reason
                except openai.APIError as error:
                    return error

            work = asyncio.gather(*(one(index) for index in range(number)))
            if during is not None:
                await asyncio.sleep(0.5)
                await asyncio.to_thread(during)
            return list(await work)

    return asyncio.run(main())


def test_a_hundred_at_once_on_a_full_cache(served: Served) -> None:
    sent = served.sent()
    assert crowd(served, 100) == ["length"] * 100
    served.at_rest()
    assert served.sent() >= sent + 40
    assert served.routed("fallback") == 0
    served.is_well()


def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    served.at_rest()
    stream = served.complete(
        TEXT[:2000], max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    running = "vllm:num_requests_running{}"
    assert served.metrics("decode")[running] == 1
    stream.close()
    served.at_rest()
    impatient = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=1)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(
            model="tiny", prompt="a", max_tokens=2000, extra_body={"ignore_eos": True}
        )
    served.at_rest()
    served.is_well()


# --- deaths ------------------------------------------------------------------------------------------


def kill(served: Served, mark: str) -> None:
    os.kill(served.child(mark).pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["--vllm-pd-disaggregation", "--worker-urls"])
def test_a_killed_router(served: Served, router: str) -> None:
    # It has a title of its own by now; its port tells which one it is.
    before = served.output().count("restarts in")
    name = "router-transfer" if "pd" in router else "router-direct"
    front = served.child("alone.py front").cmdline()
    url = front[front.index("--transfer" if "pd" in router else "--direct") + 1]
    port = int(url.rpartition(":")[2])
    (found,) = [
        one
        for one in served.children()
        if port in [c.laddr.port for c in one.net_connections("tcp") if c.status == "LISTEN"]
    ]
    found.kill()
    assert served.complete(TEXT[:2000]).usage.completion_tokens > 0
    assert served.complete("a").usage.completion_tokens > 0
    served.wait(lambda: served.output().count("restarts in") == before + 1)
    assert f"{name} ended by signal 9" in served.output()
    served.is_well()


@pytest.mark.slow
def test_a_prefill_engine_killed_under_load(served: Served) -> None:
    fallbacks = served.routed("fallback")
    answers = crowd(served, 60, lambda: kill(served, '"role":"prefill"'))
    assert answers == ["length"] * 60, (served.folder / "logs" / "front.log").read_text()
    assert crowd(served, 10) == ["length"] * 10
    assert served.routed("fallback") > fallbacks
    served.wait(lambda: "prefill-0 ended by signal 9; the last lines of" in served.output())
    served.is_well()


@pytest.mark.slow
def test_a_decode_engine_killed_under_load(served: Served) -> None:
    answers = crowd(served, 20, lambda: kill(served, '"role":"decode"'), least=300)
    errors = [answer for answer in answers if answer != "length"]
    assert errors, "nothing was in flight"
    for error in errors:
        assert isinstance(error, openai.APIError), error
        assert "try again" in str(error), error
    served.wait(lambda: "decode-0 ended by signal 9; the last lines of" in served.output())
    served.is_well()


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_leaves_nothing(served: Served) -> None:
    served.at_rest()
    family = psutil.Process(served.process.pid).children(recursive=True)
    memory = set().union(*(shared_memory(members(one.pid)) for one in served.children()))
    memory = {path for path in memory if Path(path).exists()}
    assert memory
    stream = served.complete(
        TEXT[:2000], max_tokens=30, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(iter(stream))]
    served.process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert served.process.wait(PATIENCE) == 0
    assert [one for one in family if one.is_running() and one.status() != "zombie"] == []
    assert [path for path in memory if Path(path).exists()] == []
    assert not served.whole()


# --- one engine --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_colocated_engine(model: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    line = [*colocated(model, port, tmp_path), "--", "--max-model-len", "512", "--enforce-eager"]
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment())
    one = Served(process, port, tmp_path)
    try:
        one.wait(lambda: "ready: " in one.output())
        assert f"/v1 serves tiny with one engine (logs: {tmp_path / 'logs'})" in one.output()
        assert one.chat(FRANCE).usage.prompt_tokens == 37
        with pytest.raises(openai.AuthenticationError):
            one.client_with("wrong").models.list()
        (engine,) = one.children()
        assert KEY not in " ".join(engine.cmdline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert not engine.is_running()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_is_killed_while_it_starts_leaves_nothing(model: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            colocated(model, port, tmp_path),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    one = Served(process, port, tmp_path)
    log_of_engine = tmp_path / "logs" / "engine.log"
    # It has begun to load: another one is not let onto its port, and SIGTERM would not end it.
    one.wait(lambda: log_of_engine.exists() and "EngineCore" in log_of_engine.read_text())
    with pytest.raises(ServeError, match=f"cannot listen on port {port}"):
        for held in checks.reserve_port(Deployment(model="m", port=port)):
            held.close()
    (engine,) = one.children()
    session = os.getsid(engine.pid)
    assert len(members(session)) > 1
    process.kill()
    process.wait()
    end = time.monotonic() + PATIENCE
    while members(session):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_an_engine_that_cannot_start(model: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    line = [*colocated(model, port, tmp_path), "--", "--max-model-len", "999999"]
    told = {**environment(), "MIXQUANT_TRACEBACK": ""}
    done = subprocess.run(line, env=told, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: engine ended with exit code \d+: .*999999", last), last
    assert last.endswith(f"(full log: {tmp_path / 'logs' / 'engine.log'})")
    assert "ready" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("MIXQUANT_TEST_LARGER_SETS") != "1",
    reason="three engines are slow on few cores: MIXQUANT_TEST_LARGER_SETS=1 runs them",
)
def test_two_prefill_engines(model: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command(model, port, tmp_path, prefill=2),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    one = Served(process, port, tmp_path)
    try:
        one.wait(lambda: "ready: " in one.output())
        assert "with 2 prefill and 1 decode engines" in one.output()
        engines = [each for each in one.children() if '"role":"prefill"' in str(each.cmdline())]
        assert len(engines) == 2
        name = 'mixquant_rows_total{phase="prefill",precision="quantized"}'

        def both_read() -> bool:
            for number in range(4):  # sessions of their own, for the router to spread
                prompt = TEXT[number * 3000 :][:2500]
                done = one.complete(prompt, user=f"{number} {time.monotonic()}")
                assert done.usage.completion_tokens == 8
            return all(one.metrics_of(engine)[name] > 0 for engine in engines)

        one.wait(both_read)
        one.is_well()
        engines[0].kill()
        assert crowd(one, 20) == ["length"] * 20
        one.wait(lambda: "ended by signal 9; the last lines of" in one.output())
        one.is_well()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
