"""A real vLLM server with the plugin, as users run it: compiled, over HTTP, with OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import this_machine
from transformers import AutoTokenizer
from vllm_engines import ON_GPU, by_the_rule, require_vllm, rows_of

from mixquant.servers.ports import free_ports

require_vllm()
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="expects what a CPU serves with the default recipe"),
]

MINIMUM, HEAD, TAIL = 128, 0, 1  # the default recipe's, for int8
BLOCK = 128  # tokens of the prefix cache that are found together, on a CPU
CONTEXT = 4096  # tokens
PATIENCE = 900  # s, for what takes seconds: a busy machine is slow, and only a hang is a fault
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]

COUNTERS = ("mixquant_rows_total", "mixquant_passes_total")

# --- the server --------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running server, what it says about itself, and the passes that mixquant traced in it."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path  # its temporary files, and the following
    log: Path
    trace: Path
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            assert answer.status == 200
            return str(answer.read().decode())

    def healthy(self) -> bool:
        try:
            self.get("/health")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def metrics(self) -> dict[tuple[str, ...], float]:
        """The page's samples: (name, the values of its labels but engine and model)."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k not in ("engine", "model_name")]
                found[sample.name, *labels] = sample.value
        return found

    def passes(self) -> list[dict[str, Any]]:
        if not self.trace.exists():
            return []
        return [json.loads(line) for line in self.trace.read_text().splitlines()]

    def at_rest(self) -> tuple[dict[tuple[str, ...], float], list[dict[str, Any]]]:
        """The metrics and all passes, once no request is left and no pass is added any more."""
        end = time.monotonic() + PATIENCE
        passes = self.passes()
        while time.monotonic() < end:
            time.sleep(0.3)
            before, passes, metrics = passes, self.passes(), self.metrics()
            waiting = [metrics[f"vllm:num_requests_{what}",] for what in ("running", "waiting")]
            if waiting == [0, 0] and passes == before:
                return metrics, passes
        raise AssertionError(f"requests are left: {waiting}\n{self.end_of_log()}")

    def end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def counters(self) -> list[Path]:
        return list(self.folder.glob("mixquant-counters-*"))


def environment(folder: Path) -> dict[str, str]:
    """Of a server whose temporary files and compiled code stay in a folder."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(this_machine.KV_CACHE_GIB),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TMPDIR": str(folder),
        "COLUMNS": "80",
    }


@pytest.fixture(scope="module")
def server(smollm2_path: str) -> Iterator[Server]:
    """The server for this module, compiled as by default where that is right. Its end is a test, too."""
    # Not tmp_path: vLLM makes sockets there, whose paths have to be short.
    folder = Path(tempfile.mkdtemp(prefix="mq-"))
    log, trace = folder / "log.txt", folder / "trace.jsonl"
    (port,) = free_ports(1)
    command = [*SERVER, "--model", smollm2_path, "--quantization", "mixquant"]
    command += ["--dtype", this_machine.SERVED_IN, *this_machine.RECIPE_FOR_VLLM]
    command += this_machine.COMPILED_OR_NOT
    command += ["--served-model-name", "smollm2", "--max-model-len", str(CONTEXT)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment(folder), "MIXQUANT_TRACE": str(trace)},
            start_new_session=True,
        )
    running = Server(process, f"http://127.0.0.1:{port}", folder, log, trace)
    family = []
    try:
        end = time.monotonic() + PATIENCE
        while not running.healthy():
            assert process.poll() is None, f"it ended by itself\n{running.end_of_log()}"
            assert time.monotonic() < end, f"it did not start\n{running.end_of_log()}"
            time.sleep(0.5)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        assert len(running.counters()) == 1
        yield running
        so_far = len(log.read_bytes())
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM), running.end_of_log()
        assert psutil.wait_procs(family, 120)[1] == []
        assert running.counters() == []
        # vLLM's own tasks may complain that the engine ended before them.
        assert b"mixquant/engines" not in log.read_bytes()[so_far:], running.end_of_log()
    finally:
        if process.poll() is None or any(one.is_running() for one in family):
            os.killpg(process.pid, signal.SIGKILL)  # its own session
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def text(smollm2_path: str) -> list[int]:
    """Token ids of the standard library's documentation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    ids: list[int] = tokenizer("\n".join(topics.values())[:60_000])["input_ids"]
    return ids


def tally(passes: list[dict[str, Any]]) -> Counter[tuple[str, ...]]:
    """What mixquant's counters should say about traced passes: rows one by one, and passes."""
    counts: Counter[tuple[str, ...]] = Counter()
    for one in passes:
        counts["mixquant_passes_total", one["kind"]] += 1
        for _, position, prompt, quantized in rows_of(one):
            phase = "prefill" if position < prompt else "decode"
            precision = "quantized" if quantized else "precise"
            counts["mixquant_rows_total", phase, precision] += 1
    return counts


def counted(metrics: dict[tuple[str, ...], float]) -> Counter[tuple[str, ...]]:
    ours = {k: int(v) for k, v in metrics.items() if k[0] in COUNTERS}
    assert len(ours) == 8
    assert ours.pop(("mixquant_rows_total", "decode", "quantized")) == 0
    return Counter(ours)


def assert_the_rule(passes: list[dict[str, Any]]) -> None:
    for one in passes:
        assert [row[3] for row in rows_of(one)] == by_the_rule(one, MINIMUM, HEAD, TAIL), one
        assert one["kind"] == ("quantized" if one["quantized"] else "precise")


def positions_of(passes: list[dict[str, Any]], request: str) -> list[int]:
    """The positions at which a request's tokens went through the model, in order of time.

    vLLM appends the number of the prompt and something random to a request's name.
    """
    return [
        position
        for one in passes
        for name, position, _, _ in rows_of(one)
        if name.startswith(f"{request}-")
    ]


# --- start, answers, counters ------------------------------------------------------------------------


def test_the_log_says_what_each_layer_became(server: Server) -> None:
    # Where nothing is compiled, the table comes with the first pass.
    server.client.completions.create(model="smollm2", prompt="One", max_tokens=1)
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert "extra MiB" in log
    rows = re.findall(r"│ (\w+) +│ +(\d+) │ (\w+) +│ ([\w ()]+?) +│ +([\d.]+) │ +│", log)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    kernel = "emulation (slow)" if this_machine.EMULATES else "vLLM oneDNN"
    assert [row[:4] for row in rows] == [(name, "30", "int8", kernel) for name in names]
    # A byte for each of 30 x 576 x (576 + 2 x 192 + 576 + 3 x 1536) weights, and a few for scales.
    extra = sum(float(row[4]) for row in rows)
    assert extra == pytest.approx(101.25, rel=0.02)
    (total,) = re.findall(r"│ +│ +120 │ +│ +│ +([\d.]+) │ +│", log)
    assert extra == pytest.approx(float(total), abs=0.25)
    # As wide as the table, so it may go on in the next line, after what vLLM puts before each.
    assert re.search(r"fewer\s+(\(.*\] )?than 128 quantizable tokens", log)


def test_an_easy_question(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="smollm2", messages=FRANCE, temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


@dataclass
class Turn:
    text: str
    prompt: int  # tokens
    answer: int
    passes: list[dict[str, Any]]
    hits: float  # tokens found in the prefix cache, as vLLM counts them


def conversation(server: Server, stream: bool) -> list[Turn]:
    """Three turns about a text. What streams has a prefix cache of its own."""
    turns: list[Turn] = []
    messages: list[dict[str, str]] = []
    for question in (
        f"{topics['assert']}\n\nWhich statement does this text describe?",
        "What is the capital of France?",
        "And of Italy?",
    ):
        messages.append({"role": "user", "content": question})
        options: dict[str, Any] = {
            "model": "smollm2",
            "messages": messages,
            "temperature": 0,
            "max_tokens": 24,
            "extra_body": {"cache_salt": f"streams: {stream}"},
        }
        before, seen = server.at_rest()
        if stream:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(server.client.chat.completions.create(**options))
            pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
            assert sum(piece != "" for piece in pieces) > 3, "it came in one piece"
            answer, usage = "".join(pieces), chunks[-1].usage
        else:
            done = server.client.chat.completions.create(**options)
            answer, usage = done.choices[0].message.content, done.usage
        messages.append({"role": "assistant", "content": answer})
        after, passes = server.at_rest()
        passes = passes[len(seen) :]
        assert counted(after) - counted(before) == tally(passes)
        hits = ("vllm:prefix_cache_hits_total",)
        turns.append(
            Turn(
                answer,
                usage.prompt_tokens,
                usage.completion_tokens,
                passes,
                after[hits] - before[hits],
            )
        )
    return turns


def test_a_conversation_streamed_or_not_reads_only_what_is_new(server: Server) -> None:
    streamed, whole = conversation(server, stream=True), conversation(server, stream=False)
    for a, b in zip(streamed, whole, strict=True):
        assert (a.text, a.prompt, a.answer, a.hits) == (b.text, b.prompt, b.answer, b.hits)
        alike = ("first_positions", "row_counts", "prompt_lengths", "quantized")
        assert [[one[k] for k in alike] for one in a.passes] == [
            [one[k] for k in alike] for one in b.passes
        ]
    assert "Paris" in streamed[1].text
    assert "Rome" in streamed[2].text

    assert streamed[0].hits == 0
    assert streamed[0].passes[0]["quantized"] == [[0, streamed[0].prompt - 1]]
    for earlier, turn in pairwise(streamed):
        (first,) = turn.passes[0]["first_positions"]
        assert first == turn.hits
        assert first >= earlier.prompt // BLOCK * BLOCK > 0
        # Each token once: what was not cached, and the answer but for its last one.
        assert [position for one in turn.passes for _, position, _, _ in rows_of(one)] == list(
            range(first, turn.prompt + turn.answer - 1)
        )
    for turn in streamed:
        assert_the_rule(turn.passes)


@pytest.mark.parametrize(
    ("length", "quantized"), [(1000, 999), (60, 0), (128, 0), (129, 128), (3000, 2999)]
)
def test_the_counters_agree_with_the_trace(
    server: Server, text: list[int], length: int, quantized: int
) -> None:
    before, seen = server.at_rest()
    done = server.client.completions.create(
        model="smollm2",
        prompt=text[:length],
        temperature=0,
        max_tokens=5,
        extra_body={"ignore_eos": True, "cache_salt": f"counters {length}"},
    )
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (length, 5)
    after, passes = server.at_rest()
    passes = passes[len(seen) :]
    prefills = sum(bool(one["first_positions"][0] < length) for one in passes)
    assert (prefills > 1) == (length > 2048)  # the server's largest pass
    assert counted(after) - counted(before) == Counter(
        {
            ("mixquant_rows_total", "prefill", "quantized"): quantized,
            ("mixquant_rows_total", "prefill", "precise"): length - quantized,
            ("mixquant_rows_total", "decode", "precise"): 4,
            ("mixquant_passes_total", "quantized"): prefills if quantized else 0,
            ("mixquant_passes_total", "precise"): 4 if quantized else 5,
        }
    )
    assert tally(passes) == +(counted(after) - counted(before))
    assert_the_rule(passes)


# --- what requests may ask for -----------------------------------------------------------------------


def test_an_answer_by_a_json_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 30},
            "founded": {"type": "integer", "minimum": 0, "maximum": 3000},
        },
        "required": ["city", "founded"],
        "additionalProperties": False,
    }
    # A long prompt, so that quantized rows come before the first constrained token.
    question = f"{topics['assert']}\n\nWhat is the capital of France?"
    done = server.client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert done.choices[0].finish_reason == "stop"
    answer = json.loads(done.choices[0].message.content)
    assert answer.keys() == {"city", "founded"}
    assert isinstance(answer["city"], str)
    assert isinstance(answer["founded"], int)


def test_an_answer_by_choice(server: Server) -> None:
    done = server.client.chat.completions.create(
        model="smollm2",
        messages=FRANCE,
        temperature=0,
        max_tokens=20,
        extra_body={"structured_outputs": {"choice": ["Rome", "Paris", "Oslo"]}},
    )
    assert done.choices[0].message.content == "Paris"


def test_logprobs(server: Server) -> None:
    done = server.client.chat.completions.create(
        model="smollm2", messages=FRANCE, temperature=0, max_tokens=7, logprobs=True, top_logprobs=5
    )
    places = done.choices[0].logprobs.content
    assert "".join(place.token for place in places) == "The capital of France is Paris."
    for place in places:
        likeliest = [entry.logprob for entry in place.top_logprobs]
        assert (place.top_logprobs[0].token, likeliest[0]) == (place.token, place.logprob)
        assert likeliest == sorted(likeliest, reverse=True)
        assert sum(math.exp(logprob) for logprob in likeliest) <= 1 + 1e-5


def test_several_answers_and_stop_strings(server: Server, text: list[int]) -> None:
    done = server.client.completions.create(
        model="smollm2",
        prompt="The capital of France is",
        temperature=0,
        max_tokens=20,
        stop=[".", ","],
    )
    assert done.choices[0].text == " Paris"
    assert done.choices[0].finish_reason == "stop"

    _, seen = server.at_rest()
    ask = {"model": "smollm2", "prompt": text[5000:5300], "max_tokens": 12, "temperature": 1.5}
    done = server.client.completions.create(
        **ask,
        n=2,
        seed=1,
        stop=["zzzzzz"],
        extra_body={"ignore_eos": True},
        extra_headers={"X-Request-Id": "two"},
    )
    assert [choice.finish_reason for choice in done.choices] == ["length", "length"]
    assert done.choices[0].text != done.choices[1].text
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (300, 24)
    _, passes = server.at_rest()
    passes = passes[len(seen) :]
    names = {name for one in passes for name in one["requests"]}
    assert len(names) == 2
    assert_the_rule(passes)
    for name in names:
        positions = positions_of(passes, name.rpartition("-")[0])
        assert positions == list(range(positions[0], 300 + 12 - 1))


# --- many at once ------------------------------------------------------------------------------------


@dataclass
class Job:
    """One request of the crowd."""

    name: str
    delay: float  # s
    prompt: list[int]
    tokens: int  # of the answer
    stream: bool
    closes_after: int | None  # chunks; None: it is read to its end
    reason: str = ""
    usage: tuple[int, int] = (0, 0)


def crowd(text: list[int]) -> list[Job]:
    """200 requests, short ones as likely as long ones, some of which begin alike."""
    rng = random.Random(0)
    starts = [rng.randrange(len(text) - 600) for _ in range(60)]
    closed = set(rng.sample(range(200), 40))
    jobs = []
    for number in range(200):
        start, length = rng.choice(starts), round(math.exp(rng.uniform(*map(math.log, (5, 600)))))
        jobs.append(
            Job(
                f"crowd-{number}-of",
                rng.uniform(0, 20),
                text[start : start + length],
                # What is closed could go on for as long as the context lasts.
                CONTEXT - 600 if number in closed else rng.randint(1, 12),
                number in closed or rng.random() < 0.5,
                rng.randint(0, 4) if number in closed else None,
            )
        )
    return jobs


async def send(jobs: list[Job], url: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:

        async def one(job: Job) -> None:
            await asyncio.sleep(job.delay)
            options: dict[str, Any] = {
                "model": "smollm2",
                "prompt": job.prompt,
                "temperature": 0,
                "max_tokens": job.tokens,
                "extra_body": {"ignore_eos": True},
                # A connection kept open may be closed by the server just as a request is sent on it.
                "extra_headers": {"X-Request-Id": job.name, "Connection": "close"},
            }
            if not job.stream:
                done = await client.completions.create(**options)
                job.reason, usage = done.choices[0].finish_reason, done.usage
                job.usage = (usage.prompt_tokens, usage.completion_tokens)
                return
            options |= {"stream": True, "stream_options": {"include_usage": True}}
            stream = await client.completions.create(**options)
            chunks = 0
            while chunks != job.closes_after:
                try:
                    chunk = await anext(stream)
                except StopAsyncIteration:
                    return
                chunks += 1
                if chunk.choices and chunk.choices[0].finish_reason:
                    job.reason = chunk.choices[0].finish_reason
                if chunk.usage:
                    job.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            await stream.close()

        await asyncio.gather(*map(one, jobs))


def test_a_crowd_of_which_some_leave(server: Server, text: list[int]) -> None:
    before, seen = server.at_rest()
    jobs = crowd(text)
    try:
        asyncio.run(asyncio.wait_for(send(jobs, server.url), PATIENCE))
    except TimeoutError:
        left = [job for job in jobs if job.closes_after is None and not job.usage[0]]
        pytest.fail(f"not answered: {left}\n{server.metrics()}\n{server.end_of_log()}")
    after, passes = server.at_rest()
    passes = passes[len(seen) :]

    assert server.healthy()
    assert server.process.poll() is None
    assert after["vllm:kv_cache_usage_perc",] == 0
    assert after["vllm:num_preemptions_total",] == 0
    assert_the_rule(passes)
    assert tally(passes) == +(counted(after) - counted(before))

    positions: dict[str, list[int]] = {job.name: [] for job in jobs}
    for one in passes:
        for name, position, _, _ in rows_of(one):
            job = name.removeprefix("cmpl-").rsplit("-", 2)[0]
            positions[job].append(position)
    for job in jobs:
        went, length = positions[job.name], len(job.prompt)
        if job.closes_after is not None:
            assert job.reason == ""
            # Tokens are no measure of how soon: on a busy machine one chunk holds many.
            assert len(went) < length + job.tokens - 1, f"{job.name} was answered to its end"
        else:
            assert (job.reason, job.usage) == ("length", (length, job.tokens))
            assert went[-1] == length + job.tokens - 2
        if went:
            assert went[0] % BLOCK == 0 and went[0] < length
            assert went == list(range(went[0], went[0] + len(went)))
    # It was a crowd: prompts together, and beside answers; some of them cached, some quantized.
    # On a slow machine passes are fewer, and larger.
    sizes = [len(one["requests"]) for one in passes]
    if this_machine.MULTIPLIES_BF16:
        assert sum(size > 2 for size in sizes) > 20
    assert sum(size for size in sizes if size > 2) > 60
    quantized = [one for one in passes if one["quantized"]]
    assert any(len(one["quantized"]) > 1 for one in quantized)
    assert any(row[1] >= row[2] for one in quantized for row in rows_of(one))
    assert any(went and went[0] > 0 for went in positions.values())

    answer = server.client.chat.completions.create(
        model="smollm2", messages=FRANCE, temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."


def test_all_that_was_ever_counted_was_traced(server: Server) -> None:
    """The passes before the first request, with which vLLM warms up, are in neither."""
    metrics, passes = server.at_rest()
    assert tally(passes) == +counted(metrics)
    assert_the_rule(passes)
    assert "Traceback" not in server.log.read_text(errors="replace")


# --- bad input ---------------------------------------------------------------------------------------

# Arguments, and what one line has to say; `QUANTIZED` is a checkpoint that is quantized already.
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "an unknown key": (
        ["--additional-config", '{"mixquant": {"fromat": "int8"}}'],
        ["unknown recipe key 'fromat'", "min_prefill_tokens"],
    ),
    "a foreign format": (
        ["--additional-config", '{"mixquant": {"format": "nvfp4"}}'],
        ["nvfp4", "none of the formats" if this_machine.EMULATES else "int8", "'emulate'"],
    ),
    "no such prefill model": (
        ["--additional-config", '{"mixquant": {"prefill_model": "/no/such/model"}}'],
        ["'/no/such/model'", "no such directory"],
    ),
    "a quantized checkpoint": (
        ["--model", "QUANTIZED"],
        ["compressed-tensors", "prefill_model"],
    ),
    "dual-batch overlap": (["--enable-dbo"], ["--enable-dbo", "dual-batch overlap"]),
}

# What the server's main function does before it starts an engine, for several command lines.
CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
for name, arguments in json.loads(sys.argv[1]).items():
    print("== " + name, flush=True)
    given = parser.parse_args(arguments)
    try:
        AsyncEngineArgs.from_cli_args(given).create_engine_config(UsageContext.OPENAI_API_SERVER)
        print("accepted", flush=True)
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def refusals(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was printed for each bad command line, and how a server ended that was given the first."""
    folder = tmp_path_factory.mktemp("refusals")
    quantized = folder / "quantized"
    quantized.mkdir()
    for file in Path(smollm2_path).iterdir():
        if file.name != "config.json":
            (quantized / file.name).symlink_to(file)
    config = json.loads((Path(smollm2_path) / "config.json").read_text())
    method = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": method}))

    common = ["--model", smollm2_path, "--quantization", "mixquant"]
    common += ["--max-model-len", str(CONTEXT)]
    lines = {
        name: [*common, *(str(quantized) if part == "QUANTIZED" else part for part in arguments)]
        for name, (arguments, _) in REFUSED.items()
    }
    first, port = next(iter(lines.values())), str(free_ports(1)[0])
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "env": environment(folder),
        "text": True,
        "errors": "replace",
    }
    begun = [
        subprocess.Popen([sys.executable, "-c", CONFIGURE, json.dumps(lines)], **options),
        subprocess.Popen([*SERVER, *first, "--host", "127.0.0.1", "--port", port], **options),
    ]
    try:
        printed, said = (one.communicate(timeout=PATIENCE)[0] for one in begun)
    finally:
        for one in begun:
            one.kill()
            one.wait(10)
    assert begun[0].returncode == 0, printed[-3000:]
    parts = re.split(r"^== (.*)\n", printed, flags=re.MULTILINE)[1:]
    return {
        "printed": dict(zip(parts[::2], parts[1::2], strict=True)),
        "server": said,
        "exit code": begun[1].returncode,
        "left": list(folder.glob("mixquant-counters-*")),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(refusals: dict[str, Any], case: str) -> None:
    said = refusals["printed"][case]
    assert "accepted" not in said
    lines = [line for line in said.splitlines() if all(word in line for word in REFUSED[case][1])]
    assert lines, said
    assert sum("mixquant cannot serve this" in line for line in lines) == 1, said


def test_a_server_with_bad_input_ends_before_it_loads_anything(refusals: dict[str, Any]) -> None:
    said = refusals["server"]
    assert refusals["exit code"] == 1
    (line,) = [line for line in said.splitlines() if "mixquant cannot serve this" in line]
    assert "ERROR" in line and "unknown recipe key 'fromat'" in line
    assert "EngineCore" not in said
    assert "Starting to load model" not in said
    assert refusals["left"] == []
