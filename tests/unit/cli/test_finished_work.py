"""What took an hour is not lost where it cannot be written, or not be printed."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sample_results

from mixquant import cli, results
from mixquant.checkpoints.models import Checkpoint
from mixquant.cli import console
from mixquant.cli.console import write_whole
from mixquant.core.recipe import Recipe
from mixquant.servers.arms import ServedArm

Command = Callable[..., int]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in an empty directory; what it would measure is there at once."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def find(*_: Any) -> Checkpoint:
        return Checkpoint("m", "m", {"model_type": "llama"})

    def tokenizer(*_: Any) -> Any:
        return lambda text, **_: {"input_ids": [5] * (len(text) // 4)}

    for one in ("compare", "fidelity", "bench", "evaluate", "tune"):
        module = importlib.import_module(f"mixquant.cli.{one}")
        monkeypatch.setattr(module, "find", find)
        monkeypatch.setattr(module, "load_tokenizer", tokenizer, raising=False)
    monkeypatch.setattr("mixquant.evaluate.compare.workload.agent_workload", lambda *_: None)
    comparison, evaluation = sample_results.comparison(), sample_results.evaluation()
    monkeypatch.setattr("mixquant.evaluate.compare.run.compare", lambda *_, **__: comparison)
    monkeypatch.setattr("mixquant.evaluate.benchmarks.run.evaluate", lambda *_: (evaluation, []))

    def measure(*_: Any, done: Callable[[results.Fidelity], None], **__: Any) -> None:
        whole = sample_results.fidelity()
        for number in range(1, len(whole.arms) + 1):
            done(whole.model_copy(update={"arms": whole.arms[:number]}))

    def run(
        arms: list[ServedArm], *_: Any
    ) -> Iterator[tuple[ServedArm, list[results.Measurement]]]:
        for arm in arms:
            figures = [sample_results.measurement(arm.name, "ttft", 50.0, tokens=512)]
            yield arm, figures

    monkeypatch.setattr("mixquant.evaluate.fidelity.run.measure", measure)
    tuned = SimpleNamespace(results=sample_results.tuning(), recipe=Recipe())
    monkeypatch.setattr(
        "mixquant.tune.run.Tuner", lambda *_, **__: SimpleNamespace(run=lambda: tuned)
    )
    monkeypatch.setattr("mixquant.bench.in_process.run", run)
    here = sample_results.ENVIRONMENT
    bench = importlib.import_module("mixquant.cli.bench")
    monkeypatch.setattr(bench, "environment", lambda elsewhere: here)
    points = [SimpleNamespace(name="512 tokens", workload="length", longest=544)]
    monkeypatch.setattr("mixquant.bench.workloads.points", lambda *_: points)

    def command(name: str, *options: str) -> int:
        own = {
            "evaluate": ["--benchmark", "gsm8k", "--out", str(temporary)],
            "bench": ["--engine", "transformers", "--lengths", "512"],
            "tune": ["--work", str(temporary)],
        }
        return cli.main([name, "m", *own.get(name, []), *options])

    return command


def full(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("compare", "quantized says no."),
        ("evaluate", "math500"),
        ("fidelity", "with two groups"),
        ("bench", "mixquant"),
        ("tune", "tuned"),
    ],
)
def test_on_a_full_disk_results_are_printed_and_kept_aside(
    finished: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    printed: str,
) -> None:
    monkeypatch.setattr(console, "_replace", full)
    assert finished(name, "--json", "result.json") == 2
    said = capsys.readouterr()
    assert printed in said.out
    error = said.err.splitlines()[-1]
    assert error.startswith("error: cannot write ")
    assert "No space left on device; it is kept in " in error
    kept = Path(error.rpartition(" ")[2])
    whole = results.read(kept)
    assert len(whole.arms) > 2  # a file that could not be written ended no measurement
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["compare", "evaluate", "fidelity", "bench", "tune"])
def test_results_are_written_though_nobody_reads_what_is_printed(
    finished: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("nobody listens")

    monkeypatch.setattr(console.out, "print", gone)
    assert finished(name, "--json", "result.json") == 1
    assert len(results.read(Path("result.json")).arms) > 2


def test_a_report_that_fails_takes_no_results_along(
    finished: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ZeroDivisionError("of a plot")

    monkeypatch.setattr("mixquant.report.page", broken)
    assert finished("compare", "--json", "result.json", "--report", "report.html") == 1
    assert results.read(Path("result.json")) == sample_results.comparison()


def test_with_no_room_anywhere_they_are_printed_at_least(
    finished: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # the disk of the issue, so to say
    try:
        assert finished("compare", "--json", "result.json") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr()
    assert "quantized says no." in said.out
    assert "cannot write result.json: File too large" in said.err
    assert list((tmp_path / "work").iterdir()) == []


def test_devices_and_links_are_written_into_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(fifo, "text")
    assert os.read(reader, 10) == b"text"
    assert fifo.is_fifo()
