"""The command line: bad input is one line and exit code 2, and what it prints is what was asked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixquant import cli

LONG = "9" * 5_000

COMMAND = [sys.executable, "-m", "mixquant.cli"]


@pytest.fixture
def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> object:
    """Runs the command line in an empty directory, where it must fail and leave nothing."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert list(work.iterdir()) == []
        return printed.err

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "No such command"),
        (["generate"], "MODEL"),
        (["generate", "smollm2"], "either PROMPT or --prompt-file"),
        (["generate", "smollm2", "x", "--prompt-file", "x"], "either PROMPT or --prompt-file"),
        (["generate", "smollm2", ""], "the prompt is empty"),
        (["generate", "smollm2", " \n"], "the prompt is empty"),
        (["generate", "smollm2", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "smollm2", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "smollm2", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "smollm2", "x", "--format", "fp3"], "unknown format 'fp3'"),
        (["generate", "smollm2", "x", "--recipe", "quick"], "unknown recipe 'quick'"),
        (["generate", "smollm2", "x", "--recipe", "{"], "not JSON"),
        (["generate", "smollm2", "x", "--recipe", '{"formt": "int8"}'], "'formt'"),
        (["generate", "smollm2", "x", "--recipe", '{"precise_tail": -1}'], "'precise_tail'"),
        (["generate", "smollm2", "x", "--recipe", '{"min_prefill_tokens": -5}'], "-5"),
        (["generate", "/no/such/model", "x"], "is not a model"),
        (["generate", "nobody/has-this-one", "x"], "is not a model"),
        (["generate", "smollm2", "--prompt-file", "/no/file"], "cannot read /no/file"),
        (["generate", "smollm2", "--prompt-file", "/"], "cannot read /"),
        (["frobnicate"], "(mixquant --help)"),
        (["quantize"], "(mixquant quantize --help)"),
        (["generate", "smollm2", "x", "--frobnicate"], "(mixquant generate --help)"),
        (["chat", "/no/such/model"], "is not a model"),
        (["chat", "smollm2", "--format", "fp3"], "unknown format 'fp3'"),
        (["compare", "/no/such/model"], "is not a model"),
        (["compare", "smollm2", "--arms", "bf16,fp32"], "unknown arm 'fp32'"),
        (["compare", "smollm2", "--arms", ","], "--arms"),
        (["compare", "smollm2", "--json", "/no/such/directory/x.json"], "cannot write"),
        (["compare", "smollm2", "--json", "/"], "it is a directory"),
        (["compare", "smollm2", "--report", "/no/such/directory/x.html"], "cannot write"),
        (["compare", "smollm2", "--report", "/"], "it is a directory"),
        (["compare", "smollm2", "--prompt-file", "/no/file"], "cannot read"),
        (["compare", "smollm2", "--max-new-tokens", "-3"], "--max-new-tokens"),
        (["compare", "smollm2", "--json", "x" * 300], "File name too long"),
        (["generate", "smollm2", "x", "--seed", "5000000000"], "--seed"),
        (["generate", "smollm2", "x", "--seed", LONG], "--seed"),
        (["generate", "smollm2", "x", "--max-new-tokens", "9" * 20], "--max-new-tokens"),
        (
            ["generate", "smollm2", "x", "--temperature", "1e-300"],
            "expected 0, or a number from 0.01",
        ),
        (["generate", "smollm2", "x", "--temperature", "nan"], "--temperature"),
        (["chat", "smollm2", "--temperature", "inf"], "expected 0, or a number from 0.01"),
        (["evaluate", "smollm2", "--benchmark", "gsm8k", "--top-p", "nan"], "--top-p"),
        (
            ["evaluate", "smollm2", "--benchmark", "gsm8k", "--timeout", "inf"],
            "expected a finite number",
        ),
        (["evaluate", "smollm2", "--benchmark", "gsm8k", "--temperature", "nan"], "--temperature"),
        (["bench", "smollm2", "--seed", "5000000000"], "--seed"),
        (["bench", "smollm2", "--lengths", LONG], "--lengths"),
        (["generate", "smollm2", "caf\udce9"], "'caf\\udce9' is not UTF-8 text"),
        (["generate", "smollm2", "x", "--prompt-file", "\udcff"], "is not UTF-8 text"),
        (["chat", "smollm2", "--system", "\udcff"], "is not UTF-8 text"),
        (["generate", "m" * 5_000, "x"], "is not a model"),
        (["generate", "m/" * 2_500, "x"], "is not a model"),
        pytest.param(
            ["quantize", "m" * 5_000, "out"],
            "is not a model",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("llmcompressor") is None,
                reason="llm-compressor is not installed",
            ),
        ),
        (["generate", "~no-such-user/model", "x"], "is not a model"),
        (["generate", "\0", "x"], "is not a model"),
        (["evaluate", "smollm2", "--benchmark", "gsm8k", "--data", "x" * 5_000], "cannot read"),
        (["report", "x" * 5_000], "cannot read"),
        (
            ["generate", "smollm2", "x", "--recipe", '{"ignore": ' + "[" * 100_000],
            "deeper than 100",
        ),
        (["generate", "smollm2", "x", "--recipe", f'{{"precise_tail": {LONG}}}'], "4,300 digits"),
        (["generate", "smollm2", "x", "--recipe", '{"precise_tail": 1e999}'], "holds Infinity"),
        (
            ["generate", "smollm2", "x", "--recipe", '{"precise_tail": 3000000000}'],
            "'precise_tail'",
        ),
        (["generate", "smollm2", "x", "--recipe", '{"ignore": ["\\ud800"]}'], "half a character"),
    ],
)
def test_bad_input(refused, arguments: list[str], says: str) -> None:  # type: ignore[no-untyped-def]
    assert says in refused(*arguments)


def test_binary_prompt_file(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "binary"
    file.write_bytes(b"\x89PNG\xff\x00")
    assert "not UTF-8" in refused("generate", "smollm2", "--prompt-file", str(file))
    assert "not UTF-8" in refused("compare", "smollm2", "--prompt-file", str(file))


def test_empty_prompt_file(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "empty"
    file.write_text("\n")
    assert "empty" in refused("generate", "smollm2", "--prompt-file", str(file))
    assert "empty" in refused("compare", "smollm2", "--prompt-file", str(file))


def test_quantized_model(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in (["generate", str(tmp_path), "x"], ["chat", str(tmp_path)]):
        assert "quantized already (awq)" in refused(*command)


def test_prompt_longer_than_context(refused, smollm2_path: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "long"
    file.write_text("and so on, " * 5000)
    for command in ("generate", "compare"):
        said = refused(command, smollm2_path, "--prompt-file", str(file))
        assert "too long" in said
        assert "8192" in said
    assert "8192" in refused("generate", smollm2_path, "Hi", "--max-new-tokens", "8192")


def test_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("of two\nlines")

    # By its name in sys.modules: as an attribute of the package it is the command.
    monkeypatch.setattr(importlib.import_module("mixquant.cli.generate"), "find", broken)
    assert cli.main(["generate", "smollm2", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: of two lines (MIXQUANT_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("MIXQUANT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "smollm2", "x"])


def ours(stderr: str) -> list[str]:
    """The lines less those of torchao: where it is installed, Transformers imports it, and it logs."""
    theirs = ("torchao", "_pytree.py", "Skipping import of cpp extensions")
    return [line for line in stderr.splitlines() if not any(mark in line for mark in theirs)]


def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "generate", "smollm2", "x", "--format", "fp3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = ours(done.stderr)
    assert line.startswith("error: unknown format 'fp3'")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compare", "--help"], ["--version"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "mixquant" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "nvfp4",
        "fp8",
        "int8",
        "fused kernels",
        "attention kernel",
        "torch",
        "transformers",
        "vLLM plugin",
        "VNNI",
    ):
        assert word in printed


@pytest.mark.slow
def test_generate(smollm2_path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    question = "What is the capital of France?"
    limit = ["--max-new-tokens", "8"]
    assert cli.main(["generate", smollm2_path, question, *limit]) == 0
    printed = capsys.readouterr()
    assert "Paris" in printed.out
    assert re.search(
        r"read 37 tokens \(0 in (INT8|FP8|NVFP4): fewer than 128\); wrote ", printed.err
    )

    (tmp_path / "question").write_text(question)
    file = ["--prompt-file", str(tmp_path / "question")]
    assert cli.main(["generate", smollm2_path, *file, *limit]) == 0
    assert capsys.readouterr().out == printed.out

    raw = ["generate", smollm2_path, "The capital of France is", "--raw", *limit]
    assert cli.main([*raw, "--recipe", "exact"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(" Paris")
    assert "(0 quantized: the recipe keeps every layer in BF16)" in printed.err

    sampled = [*raw, "--temperature", "2", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main([*sampled, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_chat_keeps_its_cache(smollm2_path: str) -> None:
    said = "What is the capital of France?\n\nAnd of Italy?\n/reset\nHi\n/exit\nnot read\n"
    done = subprocess.run(
        [*COMMAND, "chat", smollm2_path, "--max-new-tokens", "12"],
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    turns = [
        tuple(int(number or 0) for number in numbers)
        for numbers in re.findall(
            r"read (\d+) tokens \(.*?\)(?:, (\d+) were cached)?; wrote (\d+)", done.stderr
        )
    ]
    assert len(turns) == 3
    (read, cached, wrote), (read_next, cached_next, _), (_, cached_after_reset, _) = turns
    assert cached == 0
    assert cached_next == read + wrote - 1
    assert read_next < read  # the new message only
    assert cached_after_reset == 0


@pytest.mark.slow
def test_chat_beyond_the_context(smollm2_path: str) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", smollm2_path, "--max-new-tokens", "8"],
        input="long " * 9000 + "\nHi\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert "too long" in done.stderr
    assert "wrote" in done.stderr  # the next message is answered


@pytest.mark.slow
def test_chat_ends_cleanly_on_interrupt(smollm2_path: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "chat", smollm2_path, "--max-new-tokens", "8"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdin and process.stderr
    process.stdin.write("Hi\n")
    process.stdin.flush()
    assert any("wrote" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_compare_checks_a_second_checkpoint_before_it_loads_a_model(  # type: ignore[no-untyped-def]
    refused, smollm2_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixquant.evaluate.compare.run.load_model", None)
    said = refused("compare", smollm2_path, "--recipe", '{"prefill_model": "nowhere"}')
    assert "nowhere is not a checkpoint" in said
