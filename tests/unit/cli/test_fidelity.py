"""`mixquant fidelity`: what it refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import refusal
from vllm_engines import ON_GPU, require_vllm


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "quick"], "unknown recipe 'quick'"),
        (["--format", "fp3"], "unknown format 'fp3'"),
        (["--length", "0"], "'--length'"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--json", "nowhere/x.json"], "cannot write nowhere/x.json"),
        (["--length", "9000"], "9000 tokens and a continuation of 96 exceed the context"),
        (["--vllm-args", "--seed 1"], "--vllm-args goes with --engine vllm"),
        (["--engine=vllm", "--vllm-args=--dtype=half"], "'--dtype=half' is --dtype, which this"),
        (["--engine=vllm", "--vllm-args=-qfp8"], "'-qfp8' is -q, which this command sets"),
        (["--engine=vllm", "--vllm-args=--max-model-l 9"], "is --max-model-len, which this"),
        (["--texts", "500"], "texts, not 500"),
        (["--recipe", '{"format": {"k_proj": "fp8"}}'], "a mapping needs 'default'"),
    ],
)
def test_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    smollm2_path: str,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    if "--engine=vllm" in arguments:
        require_vllm()
    monkeypatch.setattr("mixquant.evaluate.fidelity.answers_transformers.load_model", None)
    assert says in refusal(capsys, "fidelity", smollm2_path, *arguments)


def test_short_text(capsys: pytest.CaptureFixture[str], smollm2_path: str, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The harvest was poor.")
    line = refusal(capsys, "fidelity", smollm2_path, "--text", str(file), "--length", "8")
    assert "short.txt is too short: it has 5 tokens; a prompt of 8" in line
    line = refusal(capsys, "fidelity", smollm2_path, "--text", str(file), "--texts", "2")
    assert "leave it out with --text" in line


def test_a_format_that_vllm_would_emulate(
    capsys: pytest.CaptureFixture[str], smollm2_path: str
) -> None:
    require_vllm()
    if ON_GPU:
        pytest.skip("a GPU may have it")
    line = refusal(capsys, "fidelity", smollm2_path, "--engine", "vllm", "--format", "nvfp4")
    assert "does not multiply nvfp4 natively" in line
