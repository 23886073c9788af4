"""`mixquant bench` with real servers: arms that it starts, and one that runs already."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import this_machine
from served import Served
from vllm_engines import ON_GPU, require_vllm

from mixquant import cli, results
from mixquant.bench.generator import generator
from mixquant.bench.trace import Request

require_vllm()
psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="expects what a CPU serves with the default recipe"),
    this_machine.needs_patience,
]

COMMAND = [sys.executable, "-m", "mixquant.cli", "bench"]
PATIENCE = 900  # s: only a hang is a fault
BLOCK = 128  # tokens of the prefix cache that are found together, on a CPU
EAGER = f"--enforce-eager --max-model-len 1024 --dtype {this_machine.SERVED_IN}"
TINY = ["--lengths", "20,300", "--batches", "2", "--concurrencies", "1", "--prompt-tokens", "150"]
TINY += ["--output-tokens", "4", "--repeats", "2"]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of a long tool result and a short question about it."""
    messages = [
        {"role": "user", "content": "Read the file, then answer."},
        {"role": "assistant", "content": "read()"},
        {"role": "tool", "content": "All work and no play makes Jack a dull boy. " * 30},
        {"role": "assistant", "content": "It is dull."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "No play."},
    ]
    file = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    file.write_text(json.dumps({"session": "s", "messages": messages}))
    return file


# --- arms that are started ---------------------------------------------------------------------------


@dataclass
class Started:
    code: int
    out: str
    err: str
    bench: results.Bench
    logs: Path


@pytest.fixture(scope="module")
def started(
    smollm2_path: str, served: Served, trace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Started:
    """One run: an arm that is started, one that runs already, and a last one that does not start."""
    folder = tmp_path_factory.mktemp("started")
    command = [*COMMAND, smollm2_path, *TINY, "--trace", str(trace), "--vllm-args", EAGER]
    command += ["--arm", "bf16", "--url", f"mixquant={served.url}", "--served-name", served.name]
    command += ["--arm", "broken=--no-such-flag"]
    command += ["--json", str(folder / "bench.json"), "--log-dir", str(folder / "logs")]
    environment = {**os.environ, "OPENAI_API_KEY": served.key}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert (folder / "bench.json").exists(), done.stderr[-3000:]
    bench = results.read(folder / "bench.json")
    assert isinstance(bench, results.Bench)
    return Started(done.returncode, done.stdout, done.stderr, bench, folder / "logs")


def test_an_arm_that_does_not_start_leaves_the_others_results(started: Started) -> None:
    assert started.code == 2
    last = started.err.strip().splitlines()[-1]
    assert last.startswith("error: vLLM ended while it started: ")
    assert "--no-such-flag" in last and "broken.log" in last
    assert "finished: bf16, mixquant" in started.err
    assert [arm.name for arm in started.bench.arms] == ["bf16", "mixquant"]
    assert {figure.arm for figure in started.bench.results} == {"bf16", "mixquant"}
    assert "mixquant" in started.out and "Agent trace" in started.out
    logs = {file.name for file in started.logs.iterdir()}
    assert logs == {"generator.log", "bf16.log", "broken.log"}


def test_figures_of_every_workload_are_there_and_agree(started: Started) -> None:
    points = {(f.workload, f.concurrency) for f in started.bench.results}
    assert points == {("length", 1), ("batch", 2), ("concurrency", 1), ("agent", 1)}
    by_point: dict[tuple[object, ...], dict[str, results.Measurement]] = {}
    for figure in started.bench.results:
        assert figure.value > 0 or figure.unit == "share"
        if figure.lowest is not None and figure.highest is not None:
            assert figure.lowest <= figure.value <= figure.highest
        place = (figure.arm, figure.workload, figure.tokens)
        by_point.setdefault(place, {})[figure.metric] = figure
    assert len(by_point) == 2 * 5
    for (_, workload, tokens), found in by_point.items():
        assert {"ttft", "tpot", "itl", "e2e", "output", "total", "cached"} <= set(found)
        assert ("prefill" in found) == (workload in ("length", "batch"))
        assert found["ttft"].value <= found["e2e"].value
        assert found["output"].value < found["total"].value
        if workload != "agent":  # 4 tokens written for these read
            ratio = found["total"].value / found["output"].value
            assert ratio == pytest.approx((tokens + 4) / 4)  # type: ignore[operator]


def test_shares_are_by_the_rule(started: Started) -> None:
    shares = {
        (f.arm, f.workload, f.tokens): f.value
        for f in started.bench.results
        if f.metric == "quantized"
    }
    assert not any(arm == "bf16" for arm, *_ in shares)
    agent = next(value for (_, workload, _), value in shares.items() if workload == "agent")
    # Its first and last turn are short.
    assert 0 < agent < 1
    assert {place[1:]: v for place, v in shares.items() if place[1] != "agent"} == {
        ("length", 20): 0.0,  # below min_prefill_tokens
        ("length", 300): pytest.approx(299 / 300),  # the last token is precise
        ("batch", 150): pytest.approx(149 / 150),
        ("concurrency", 150): pytest.approx(149 / 150),
    }


def test_only_the_trace_finds_anything_in_the_prefix_cache(started: Started) -> None:
    for figure in started.bench.results:
        if figure.metric == "cached":
            assert (figure.value > 0) == (figure.workload == "agent"), figure


# --- a server that runs already ----------------------------------------------------------------------


def ask(served: Served, smollm2_path: str, *arguments: str) -> int:
    asking = ["bench", smollm2_path, "--url", f"one={served.url}", "--served-name", served.name]
    return cli.main([*asking, *arguments])


@pytest.mark.parametrize(
    ("key", "arguments", "says"),
    [
        (None, [], "answers 401 Unauthorized; it wants another key"),
        (Served.key, ["--served-name", "other"], "does not serve 'other' but 'served'"),
        (
            Served.key,
            ["--lengths", str(Served.context - 3)],
            f"at most {Served.context} tokens in a request; 'length",
        ),
    ],
)
def test_what_a_server_cannot_do_is_refused_first(
    key: str | None,
    arguments: list[str],
    says: str,
    served: Served,
    smollm2_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    small = ["--lengths", "5", "--trace", "none", "--output-tokens", "4"]
    assert ask(served, smollm2_path, *small, *arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.out == ""


def test_answers_are_of_the_lengths_asked_for(served: Served, tmp_path: Path) -> None:
    sessions = [
        [Request(tuple(range(100, 100 + n)), o) for n, o in ((7, 1), (9, 6))],
        [Request(tuple(range(200, 230)), 3)],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", served.key)
        with generator(tmp_path / "log.txt") as load:
            answers = load.send(served.url, served.name, sessions, 2)
    assert [(a.prompt_tokens, a.output_tokens) for a in answers] == [(7, 1), (9, 6), (30, 3)]
    for answer in answers:
        assert 0 < answer.ttft <= answer.e2e
    first, second, _ = answers
    assert second.start >= first.start + first.e2e  # its turn comes when the one before is answered


def test_all_arms_read_the_same_tokens_and_no_key_is_written(
    served: Served,
    smollm2_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One server under two names: the second finds the prompts of the first in the prefix cache."""
    monkeypatch.setenv("OPENAI_API_KEY", served.key)
    file, logs = tmp_path / "bench.json", tmp_path / "logs"
    arguments = ["--url", f"two={served.url}/v1/", "--lengths", "300", "--batches", "none"]
    arguments += ["--concurrencies", "none", "--trace", "none", "--output-tokens", "4"]
    arguments += ["--json", str(file), "--log-dir", str(logs)]
    assert ask(served, smollm2_path, *arguments) == 0
    bench = results.read(file)
    assert isinstance(bench, results.Bench)
    assert [(arm.name, arm.url, arm.arguments) for arm in bench.arms] == [
        ("one", served.url, None),
        ("two", served.url, None),
    ]
    cached = {f.arm: f.value for f in bench.results if f.metric == "cached"}
    assert cached == {"one": 0.0, "two": pytest.approx(300 // BLOCK * BLOCK / 300)}
    assert bench.environment.threads is None  # of a server that may be anywhere
    printed = capsys.readouterr()
    written = [printed.out, printed.err, *(f.read_text() for f in (file, *logs.iterdir()))]
    assert not any(served.key in text for text in written)


# --- the end of a run --------------------------------------------------------------------------------


def test_ctrl_c_leaves_no_process_behind(smollm2_path: str, tmp_path: Path) -> None:
    """While a server starts: it has processes of its own by then, and answers nothing yet."""
    command = [*COMMAND, smollm2_path, *TINY, "--trace", "none", "--arm", "bf16"]
    command += ["--vllm-args", EAGER, "--log-dir", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ours = psutil.Process(process.pid)
    family: list[Any] = []
    try:
        end = time.monotonic() + PATIENCE
        while not any("EngineCore" in text for text in cmdlines(family)):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.2)
            family = ours.children(recursive=True)
        assert any("api_server" in text for text in cmdlines(family))
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive


def cmdlines(processes: list[Any]) -> list[str]:
    found = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(one.cmdline()))
    return found
