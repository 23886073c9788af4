"""`mixquant evaluate`: the real command against servers over real HTTP, killed, stopped and misused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_results
import torch
from chat_stub import Body, Drop, Refuse, Stub, question, serving, until
from fake_vllm import solve
from paths import HELPERS

from mixquant import cli, results
from mixquant.evaluate.benchmarks.scoring import Answered
from mixquant.servers import process as server

pytest.importorskip("math_verify", reason="the extra `eval` is not installed")

COMMAND = [sys.executable, "-m", "mixquant.cli", "evaluate"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, and no keys in the environment."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("MIXQUANT_JUDGE_KEY", "OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return work


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A file in GSM8K's schema: 20 sums, ten of whose first numbers are odd."""
    path = tmp_path / "sums.jsonl"
    lines = [
        {"question": f"What is {first} + {first * 7}?", "answer": f"Add. #### {first * 8}"}
        for first in range(20)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub(solve)) as stub:
        yield stub


def evaluate(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def lines(work: Path, arm: str = "mine") -> list[dict[str, Any]]:
    path = work / "mixquant-evaluation" / "gsm8k" / f"{arm}.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole][1:]


# Scores


def test_arms_side_by_side(work: Path, sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def half_lost(body: Body) -> str:
        first = int(re.search(r"(\d+) \+", question(body)[0])[1])  # type: ignore[index]
        return solve(body, wrong_if_odd=first < 10)

    with (
        serving(Stub(solve)) as bf16,
        serving(Stub(lambda body: solve(body, True))) as quantized,
        serving(Stub(half_lost)) as mixquant,
    ):
        urls = {"mixquant": mixquant, "bf16": bf16, "quantized": quantized}
        arms = [f"--url={name}={its.url}/v1/" for name, its in urls.items()]
        asking = ["stub", "--benchmark=gsm8k", "--data", sums, "--seeds=2", "--top-k=7", *arms]
        assert evaluate(*asking, "--json=out.json") == 0
        for its in urls.values():
            assert len(its.asked) == 40
            assert {body["seed"] for body in its.asked} == {0, 1}
            assert {body["temperature"] for body in its.asked} == {0.6}
            assert {body["top_p"] for body in its.asked} == {0.95}
            assert {body["top_k"] for body in its.asked} == {7}
            assert {body["max_tokens"] for body in its.asked} == {2048}  # half of what it takes
            kwargs = [body["chat_template_kwargs"] for body in its.asked]
            assert all(its == {"enable_thinking": True} for its in kwargs)

    read = results.read(work / "out.json")
    assert isinstance(read, results.Evaluation)
    assert results.read(work / "mixquant-evaluation" / "results.json") == read
    assert [arm.name for arm in read.arms] == ["bf16", "quantized", "mixquant"]
    assert [score.score for score in read.scores] == [1.0, 0.5, 0.75]
    assert all(score.items == 20 and score.seeds == 2 for score in read.scores)
    differences = {(one.arm, one.versus): one for one in read.differences}
    assert differences["mixquant", "bf16"].difference == -0.25
    assert differences["mixquant", "quantized"].difference == 0.25
    assert differences["quantized", "bf16"].high < 0
    (recovery,) = read.recoveries
    assert (recovery.benchmark, recovery.arm, recovery.recovery) == ("gsm8k", "mixquant", 0.5)
    printed = capsys.readouterr().out
    assert all((s.prompt_tokens, s.answer_tokens) == (7, 3) for s in read.scores)  # the stub's
    assert re.search(r"gsm8k +mixquant +100\.0% +7 +3\b", printed)
    for shown in ("100.0", "50.0", "75.0", "28.4 - 71.6", "-50.0", "recovery of mixquant", "50%"):
        assert shown in printed


def test_needles_at_several_lengths(
    work: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(body: Body) -> str:
        text = question(body)[0]
        (key,) = re.findall(r"for (\w+-\w+) mentioned", text)[-1:] or [""]
        return ", ".join(re.findall(rf"for {key} is: (\S+)\.", text)) or "I do not know."

    stub.answer = found
    stub.models = {"stub": 8192}
    asking = ["stub", "--benchmark=needle", f"--url=mine={stub.url}", "--length=512,1024"]
    assert evaluate(*asking, "--limit=32") == 0
    assert len(stub.asked) == 32
    assert {body["max_tokens"] for body in stub.asked} == {128}
    assert {body["temperature"] for body in stub.asked} == {0}
    assert not any(body["chat_template_kwargs"]["enable_thinking"] for body in stub.asked)
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    parts = {part.benchmark.removeprefix("needle/"): part for part in read.subscores}
    assert list(parts)[:2] == ["512", "512 single-1"]
    assert len(parts) == 2 * (1 + 8)
    assert (parts["512"].items, parts["1024 multivalue"].items) == (16, 2)
    assert parts["1024 multivalue"].score == parts["512 multikey-1"].score == 1
    assert parts["512 multiquery"].score < 1
    printed = capsys.readouterr()
    assert "1024 multikey-2" in printed.out
    assert "lengths of prompts are estimated: stub is not a model" in printed.err


def test_more_seeds_and_items_go_on_from_what_is_there(work: Path, sums: Path, stub: Stub) -> None:
    asking = ["stub", "--benchmark=gsm8k", "--data", sums, f"--url=mine={stub.url}"]
    assert evaluate(*asking, "--limit=5") == 0
    first = set(stub.times)
    assert len(first) == 5
    assert evaluate(*asking, "--limit=8", "--seeds=2") == 0
    assert len(stub.times) == 16
    assert first < set(stub.times)
    assert set(stub.times.values()) == {1}
    assert evaluate(*asking, "--limit=8", "--seeds=2") == 0
    assert len(stub.asked) == 16
    assert evaluate(*asking, "--limit=3") == 0  # and fewer are counted without the others
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    assert (read.scores[0].items, read.scores[0].seeds) == (3, 1)


def test_a_protocol_has_its_own_prompts_seeds_and_files(
    work: Path, sums: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = ["stub", "--benchmark=gsm8k", "--data", sums, f"--url=mine={stub.url}", "--seeds=2"]
    assert evaluate(*asking, "--protocol=mix-quant", "--limit=4") == 0
    assert {seed for _, seed in stub.times} == {42, 43}
    assert all(text.startswith("Put your final answer within") for text, _ in stub.times)
    assert {line["seed"] for line in lines(work)} == {42, 43}
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    assert read.settings["protocol"] == "mix-quant"
    assert read.settings["benchmarks"]["gsm8k"]["first_seed"] == 42
    assert (read.scores[0].score, read.scores[0].seeds) == (1, 2)
    assert evaluate(*asking, "--protocol=mix-quant", "--limit=4") == 0
    assert len(stub.asked) == 8
    capsys.readouterr()
    other = refused(capsys, *asking, "--limit=4")
    assert 'protocol was "mix-quant", and is null' in other


def test_what_fails_counts_as_wrong_is_named_and_asked_again(
    work: Path, sums: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: Body) -> str:
        if "What is 3 " in question(body)[0]:
            raise Refuse(400, "a bad question")
        return solve(body)

    stub.answer = answer
    asking = ["stub", "--benchmark=gsm8k", "--data", sums, f"--url=mine={stub.url}"]
    assert evaluate(*asking) == 1
    err = capsys.readouterr().err
    assert "gsm8k, mine: 1 requests failed; the first, item 4 with seed 0" in err
    assert "a bad question" in err
    assert "the same command asks them again" in err
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    assert (read.scores[0].score, read.scores[0].failed) == (0.95, 1)
    stub.answer = solve
    assert evaluate(*asking) == 0
    assert Counter(stub.times.values()) == {1: 19, 2: 1}


# Ended in the middle


class Gate:
    """Lets so many requests be answered, and holds the others until it is opened again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = 0
        self._era = 0

    def open(self, requests: int) -> None:
        """Those that are held are dropped: their client is gone."""
        with self._changed:
            self._left = requests
            self._era += 1
            self._changed.notify_all()

    def answer(self, body: Body) -> str:
        with self._changed:
            era = self._era
            self._changed.wait_for(lambda: self._left > 0 or self._era != era)
            if self._era != era:
                raise Drop
            self._left -= 1
        return solve(body)


def asked(stub: Stub, item: str, seed: int) -> int:
    problem = f"What is {int(item) - 1} + "
    return sum(n for (text, its), n in stub.times.items() if problem in text and its == seed)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_without_repeating_or_losing_an_item(
    work: Path, sums: Path, how: signal.Signals
) -> None:
    gate = Gate()
    finished: set[tuple[str, int]] = set()
    times: dict[tuple[str, int], int] = {}  # how often each was asked when it was finished
    with serving(Stub(gate.answer)) as stub:
        command = [*COMMAND, "stub", "--benchmark=gsm8k", f"--data={sums}", "--seeds=2"]
        command += [f"--url=mine={stub.url}", "--concurrency=4"]
        for more in (7, 12):
            gate.open(more)
            wanted = len(finished) + more
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            until(lambda: len(lines(work)) == wanted and stub.times.total() >= wanted + 4)  # noqa: B023
            process.send_signal(how)
            said = process.communicate()[1]
            assert process.returncode == (-how if how == signal.SIGKILL else 130)
            assert ("the same command continues from there" in said) == (how == signal.SIGINT)
            finished = {(line["item"], line["seed"]) for line in lines(work)}
            assert len(finished) == wanted
            times = {key: times.get(key) or asked(stub, *key) for key in finished}
        gate.open(1000)
        # Killed, its scorers' processes may hold the directory for a moment longer.
        until(lambda: evaluate(*command[len(COMMAND) :]) == 0)

    keys = [(line["item"], line["seed"]) for line in lines(work)]
    assert sorted(keys) == sorted((str(item), seed) for item in range(1, 21) for seed in (0, 1))
    assert times == {key: asked(stub, *key) for key in times}
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    assert (read.scores[0].score, read.scores[0].items, read.scores[0].failed) == (1.0, 20, 0)


@pytest.mark.slow
def test_a_second_process_is_refused(
    work: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate()
    with serving(Stub(gate.answer)) as stub:
        asking = ["stub", "--benchmark=gsm8k", f"--data={sums}", f"--url=mine={stub.url}"]
        process = subprocess.Popen([*COMMAND, *asking])
        try:
            until(lambda: len(stub.asked) > 0)
            assert evaluate(*asking) == 2
            assert "another process writes to mixquant-evaluation" in capsys.readouterr().err
        finally:
            process.kill()
            process.wait()
        gate.open(1000)
        assert evaluate(*asking) == 0  # the lock of a process that was killed is free


# Servers that are started


@pytest.fixture
def fake_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: str
) -> Iterator[tuple[list[str], Path]]:
    """The command line with `fake_vllm` in vLLM's place, and the file that says what was started."""
    started = tmp_path / "started"
    monkeypatch.setenv("FAKE_VLLM_STARTED", str(started))
    monkeypatch.setattr(server, "SERVER_COMMAND", (sys.executable, str(HELPERS / "fake_vllm.py")))
    script = tmp_path / "with_fake_vllm.py"
    script.write_text(
        "import sys\nfrom mixquant import cli\nfrom mixquant.servers import process as server\n"
        # Guarded: the scorers' processes import it, too.
        f"server.SERVER_COMMAND = {server.SERVER_COMMAND!r}\n"
        "if __name__ == '__main__':\n    sys.exit(cli.main())\n"
    )
    yield [sys.executable, str(script), "evaluate", smollm2_path], started


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_arms_are_started_one_after_the_other(
    work: Path, sums: Path, fake_vllm: tuple[list[str], Path], smollm2_path: str
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    recipe = '{"format": "int8", "min_prefill_tokens": 5}'
    asking = [smollm2_path, "--benchmark=gsm8k", "--data", sums, "--recipe", recipe]
    assert evaluate(*asking, "--vllm-args=--seed 3", "--arm=mixquant", "--arm=bf16") == 0
    assert evaluate(*asking, "--vllm-args=--seed 3") == 0  # the third arm alone is missing
    started = [json.loads(line) for line in fake_vllm[1].read_text().splitlines()]
    arguments = [" ".join(one["arguments"]) for one in started]
    assert all(f"--model {smollm2_path}" in its and "--seed 3" in its for its in arguments)
    assert ["--quantization mixquant" in its for its in arguments] == [False, True, True]
    assert ['"everywhere":true' in its for its in arguments] == [False, False, True]
    assert '"min_prefill_tokens":5' in arguments[1]
    if not torch.cuda.is_available():
        assert all("--no-enable-chunked-prefill" in its for its in arguments)
    assert not any(running(one["process"]) for one in started)
    read = results.read(work / "mixquant-evaluation" / "results.json")
    assert isinstance(read, results.Evaluation)
    assert [score.score for score in read.scores] == [1.0, 0.5, 1.0]
    assert read.recoveries[0].recovery == 1.0
    assert read.arms[2].recipe is not None
    assert read.arms[2].recipe["min_prefill_tokens"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_server(
    work: Path,
    sums: Path,
    fake_vllm: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    command, started = fake_vllm
    monkeypatch.setenv("FAKE_VLLM_HOLD", "6")
    asking = ["--benchmark=gsm8k", f"--data={sums}", "--arm=bf16"]
    process = subprocess.Popen([*command, *asking])
    until(lambda: len(lines(work, "bf16")) == 6)
    (one,) = [json.loads(line)["process"] for line in started.read_text().splitlines()]
    assert running(one)
    process.send_signal(how)
    assert process.wait() == (-how if how == signal.SIGKILL else 130)
    until(lambda: not running(one))
    assert len(lines(work, "bf16")) == 6
    monkeypatch.delenv("FAKE_VLLM_HOLD")
    until(lambda: evaluate(command[-1], *asking) == 0)
    assert len(lines(work, "bf16")) == 20


def test_a_server_that_does_not_start_is_one_line(
    work: Path,
    sums: Path,
    fake_vllm: tuple[list[str], Path],
    smollm2_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    asking = [smollm2_path, "--benchmark=gsm8k", "--data", sums]
    assert evaluate(*asking, "--arm=mine=--broken") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: vLLM ended while it started: ValueError: broken")
    assert "mine.log" in err


# Bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert evaluate(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--benchmark"),
        (["--benchmark=bogus"], "unknown benchmark 'bogus', expected one of: math500, aime24"),
        (["--benchmark=gsm8k", "--data=none.jsonl"], "cannot read none.jsonl"),
        (["--benchmark=gsm8k", "--data=math500=x"], "expected NAME=FILE with one of gsm8k"),
        (["--benchmark=gsm8k", "--benchmark=math500", "--data=x"], "expected NAME=FILE"),
        (["--benchmark=gsm8k", "--seeds=0"], "--seeds"),
        (["--benchmark=gsm8k", "--temperature=-1"], "--temperature"),
        (["--benchmark=gsm8k", "--recipe=quick"], "unknown recipe 'quick'"),
        (["--benchmark=gsm8k", "--arm=best"], "unknown arm 'best'; expected bf16, quantized"),
        (["--benchmark=gsm8k", "--url=mine"], "expected NAME=URL"),
        (["--benchmark=gsm8k", "--url=a/b=http://x"], "an arm's name"),
        (["--benchmark=gsm8k", "--url=a=http://x", "--url=a=http://y"], "two arms are called 'a'"),
        (["--benchmark=gsm8k", "--arm=a=--x 'y"], "cannot read"),
        (["--benchmark=gsm8k", "--json=."], "it is a directory"),
        (["--benchmark=gsm8k", "--length=1024"], "--length is an option of needle only; add"),
        (["--benchmark=needle", "--length=1024,9"], "--length 9: expected 512 to 131072 tokens"),
        (
            ["--benchmark=gsm8k", "--no-context"],
            "--no-context is an option of longbench-v2 only; add",
        ),
        (["--benchmark=gsm8k", "--no-cot"], "--cot is an option of longbench-v2 only; add"),
        (["--benchmark=gsm8k", "--protocol=ours"], "'ours' is not one of 'mix-quant'"),
        (["--benchmark=longbench-v2", "--no-context", "--retrieved=2"], "exclude each other"),
        (
            ["--benchmark=needle", "--length=1k"],
            "'--length': expected a whole number from 1 to 2147483647, got '1k'",
        ),
        (["--benchmark=longmemeval"], "longmemeval needs a second model"),
        (["--benchmark=longmemeval", "--judge-url=http://x"], "give both --judge-url"),
        (["--benchmark=longmemeval", "--judge-model=x"], "give both --judge-url"),
        (
            ["--benchmark=longmemeval", "--judge-url=http://x", "--judge-model=x"],
            "the judge's key is missing: set the environment variable MIXQUANT_JUDGE_KEY or OPENAI",
        ),
    ],
)
def test_bad_options_are_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    needs_server = not any(one.startswith(("--url", "--arm", "--recipe")) for one in arguments)
    url = ["--url=mine=http://127.0.0.1:9"] if needs_server else []
    assert says in refused(capsys, "smollm2", *arguments, *url)
    assert list(work.iterdir()) == []


def test_a_server_that_is_down_or_serves_another_model(
    work: Path, sums: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = ["--benchmark=gsm8k", "--data", sums]
    down = refused(capsys, "stub", *asking, "--url=mine=http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in down
    stub.models = {"one": None, "two": 100}
    wrong = refused(capsys, "stub", *asking, f"--url=mine={stub.url}")
    assert f"{stub.url} does not serve 'stub' but 'one', 'two'" in wrong
    assert "--served-name" in wrong
    assert evaluate("stub", *asking, f"--url=mine={stub.url}", "--served-name=one") == 0
    assert {body["model"] for body in stub.asked} == {"one"}
    with serving(Stub(solve, {"three": None, "two": None})) as other:
        asking += ["--served-name=three", "--served-name=two", "--out=elsewhere"]
        assert evaluate("stub", *asking, f"--url=a={stub.url}", f"--url=b={other.url}") == 0
        assert {body["model"] for body in other.asked} == {"three"}  # the first that it has
    assert {body["model"] for body in stub.asked[20:]} == {"two"}


def test_a_server_that_wants_a_key(
    work: Path,
    sums: Path,
    stub: Stub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub.key = "secret"
    asking = ["stub", "--benchmark=gsm8k", "--data", sums, f"--url=mine={stub.url}"]
    assert "answers 401" in refused(capsys, *asking)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert evaluate(*asking) == 0
    assert "secret" not in (work / "mixquant-evaluation" / "results.json").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question": "1?", "answer": "#### 1"}\n{"question": "2?"}\n', "line 2.*answer"),
        ('{"question": "1?", "answer": "one"}\n', "line 1.*answer.*####"),
        ('{"question": "1?",\n', "line 1"),
        ("", "no|empty"),
    ],
)
def test_data_of_a_wrong_schema(
    work: Path, stub: Stub, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path = work / "data.jsonl"
    path.write_text(text)
    asking = ["stub", "--benchmark=gsm8k", "--data", path, f"--url=mine={stub.url}"]
    assert re.search(says, refused(capsys, *asking))
    assert stub.asked == []


def test_an_interrupted_run_of_another_configuration(
    work: Path, sums: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = ["stub", "--benchmark=gsm8k", f"--url=mine={stub.url}"]
    assert evaluate(*asking, "--data", sums) == 0
    capsys.readouterr()
    before = lines(work)
    hot = refused(capsys, *asking, "--data", sums, "--temperature=0.9")
    assert "gsm8k/mine.jsonl holds answers of another configuration" in hot
    assert "settings.temperature was 0.6, and is 0.9" in hot
    other = work / "other.jsonl"
    other.write_text(sums.read_text().replace("What is", "What, then, is"))
    assert "items was" in refused(capsys, *asking, "--data", other)
    assert lines(work) == before
    assert len(stub.asked) == 20
    assert evaluate(*asking, "--data", other, "--out=elsewhere") == 0


def test_unjudged_answers_are_counted_apart() -> None:
    from mixquant.evaluate.benchmarks.answer_file import AnswerFile, Entry
    from mixquant.evaluate.benchmarks.chat import Usage
    from mixquant.evaluate.benchmarks.scoring import scores_of
    from mixquant.evaluate.tasks import Item, Task, Verdict

    class Judged(Task):
        name = "judged"

    items = [Item(name, (), None, group=group) for name, group in zip("abcd", "xxyy", strict=True)]
    file = AnswerFile(Path("nowhere"), {})
    answer = {"text": "?"}
    file.entries["a", 0] = Entry(answer, Usage(), verdict=Verdict(1.0), judge="j")
    file.entries["b", 0] = Entry(answer, Usage(), error="no verdict: judge is down")
    file.entries["c", 0] = Entry(None, Usage(), error="HTTP 500")
    file.entries["d", 0] = Entry(answer, Usage(), verdict=Verdict(1.0), judge="another")
    answered = Answered(Judged(), items, 1, {"arm": file}, "j")
    score, parts = scores_of(answered, "arm")
    assert score is not None
    assert (score.score, score.failed, score.unjudged) == (0.5, 1, 2)
    found = [(p.benchmark, p.score, p.failed, p.unjudged) for p in parts]
    assert found == [("judged/x", 1.0, 0, 1), ("judged/y", 0.0, 1, 1)]
    assert [name for name, *_ in answered.failed("arm")] == ["c"]
    assert [name for name, *_ in answered.unjudged("arm")] == ["b", "d"]


def test_answers_in_which_nothing_was_found_are_counted_and_their_rate_is_shown() -> None:
    from rich.console import Console

    from mixquant.cli.tables.scores import tables
    from mixquant.evaluate.benchmarks.answer_file import AnswerFile, Entry
    from mixquant.evaluate.benchmarks.chat import Usage
    from mixquant.evaluate.benchmarks.scoring import scores_of
    from mixquant.evaluate.tasks import Item
    from mixquant.evaluate.tasks.longbench import LongBenchV2
    from mixquant.report.evaluation import section

    benchmark = LongBenchV2()
    items = [Item(name, (), "A", group="short") for name in "abcd"]
    file = AnswerFile(Path("nowhere"), {})
    for item, text in zip(items, ("Option A", "B", "I cannot say.", ""), strict=True):
        verdict = asyncio.run(benchmark.score(item, {"text": text}))
        file.entries[item.id, 0] = Entry({"text": text}, Usage(), verdict=verdict)
    file.entries["d", 0] = Entry(None, Usage(), error="HTTP 500")  # failed, which is another thing
    score, _ = scores_of(Answered(benchmark, items, 1, {"bf16": file}, None), "bf16")
    assert score is not None
    assert (score.score, score.failed, score.unextracted) == (0.25, 1, 1)
    assert score.prompt_tokens is score.answer_tokens is None  # nobody counted
    for entry, tokens in zip(file.entries.values(), (10, 20, 60, 0), strict=True):
        entry.usage.prompt_tokens, entry.usage.completion_tokens = 100, tokens
    score, _ = scores_of(Answered(benchmark, items, 1, {"bf16": file}, None), "bf16")
    assert score is not None
    assert (score.prompt_tokens, score.answer_tokens) == (100, 30)  # without the one that failed

    found = sample_results.evaluation().model_copy(update={"scores": (score,), "recoveries": ()})
    console = Console(width=120)
    with console.capture() as shown:
        console.print(*tables(found))
    assert "none in 25.0%" in shown.get()
    assert re.search(r"bf16 +66\.7% +100 +30\b", shown.get())
    assert "no letter, number or call was found" in " ".join(shown.get().split())
    (failed, unextracted) = section(found).notes
    assert "1 of 4 requests got no answer" in failed
    assert "in 1 of 4 answers (25.0 %) no letter, number or call was found" in unextracted
    whole = sample_results.evaluation()
    with console.capture() as shown:
        console.print(*tables(whole))
    assert "one in" not in shown.get()


def test_where_every_request_failed_no_score_is_shown() -> None:
    from rich.console import Console

    from mixquant.cli.tables.scores import tables

    whole = sample_results.evaluation()
    scores = tuple(
        one.model_copy(
            update={"score": 0.0, "low": 0.0, "high": 0.0, "failed": one.items * one.seeds}
        )
        if (one.benchmark, one.arm) == ("math500", "mixquant")
        else one
        for one in whole.scores
    )
    console = Console(width=120)
    with console.capture() as shown:
        console.print(*tables(whole.model_copy(update={"scores": scores})))
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown.get().splitlines()]
    assert ["math500", "500", "2", "91.2", "84.8", "-"] in lines
    assert ["math500", "mixquant - bf16", "-", "-"] in lines
    assert ["math500", "recovery of mixquant", "-"] in lines
    assert ["mean", "recovery of mixquant", "-"] in lines
    assert ["bfcl-v4", "recovery of mixquant", "67%"] in lines
    assert "-: every request failed." in " ".join(shown.get().split())
    (mean,) = [line for line in lines if line[0] == "mean" and "recovery" not in line[1]]
    assert mean == ["mean", "46.4", "44.3", "47.4"]  # of the benchmarks that all arms answered
    with console.capture() as shown:
        console.print(*tables(whole))
    assert "every request failed" not in shown.get()
