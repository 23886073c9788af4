"""`mixquant fidelity`: what it refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from refusals import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm_engines import ON_GPU, require_vllm

from mixquant import cli, results


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "quick"], "unknown recipe 'quick'"),
        (["--format", "fp3"], "unknown format 'fp3'"),
        (["--length", "0"], "'--length'"),
        (
            ["--length", "8,many"],
            "'--length': expected a whole number from 1 to 2147483647, got 'many'",
        ),
        (["--length", "8,9000"], "9000 tokens and a continuation of 96 exceed the context"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--json", "nowhere/x.json"], "cannot write nowhere/x.json"),
        (["--length", "9000"], "9000 tokens and a continuation of 96 exceed the context"),
        (["--vllm-args", "--seed 1"], "--vllm-args needs --engine vllm"),
        (["--engine=vllm", "--vllm-args=--dtype=half"], "'--dtype=half' is --dtype, which this"),
        (["--engine=vllm", "--vllm-args=-qfp8"], "'-qfp8' is -q, which this command sets"),
        (["--engine=vllm", "--vllm-args=--max-model-l 9"], "is --max-model-len, which this"),
        (["--arm", "fp8=--quantization fp8"], "--arm needs --engine vllm"),
        (["--engine=vllm", "--arm", "fp8"], "--arm 'fp8': expected NAME=ARGUMENTS"),
        (["--engine=vllm", "--arm", "a/b=--seed 1"], "--arm 'a/b=--seed 1': expected NAME="),
        (["--engine=vllm", "--arm", "bf16=--seed 1"], "two arms are called 'bf16'"),
        (["--engine=vllm", "--arm", "a=--seed 1", "--arm", "a="], "two arms are called 'a'"),
        (["--engine=vllm", "--arm", "a=--max-model-len 9"], "--arm a: '--max-model-len' is"),
        (["--engine=vllm", "--arm", "a=--x 'y"], "--arm a: cannot read"),
        (["--texts", "500"], "texts, not 500"),
        (["--recipe", '{"format": {"k_proj": "fp8"}}'], "a mapping needs 'default'"),
        (["--recipe", '{"prefill_model": "nowhere"}'], "nowhere is not a checkpoint"),
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


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.build("llama").bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 3, "Why": 4, "sky": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return str(folder)


def test_several_lengths_in_one_run(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: str, tmp_path: Path
) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "fidelity.json"
    text.write_text("Why is the sky blue? " * 40)
    arguments = [tiny_checkpoint, "--text", str(text), "--length", "64,16", "--length", "32"]
    arguments += ["--answer-tokens", "4", "--recipe", "exact", "--json", str(file)]
    assert cli.main(["fidelity", *arguments, "--no-quantized"]) == 0
    result = results.read(file)
    assert isinstance(result, results.Fidelity)
    assert [(one.arm, one.prompt_tokens) for one in result.results] == [
        (arm, length) for arm in ("bf16", "exact") for length in (64, 16, 32)
    ]
    shown = " ".join(capsys.readouterr().out.split())
    assert "KL and top-1 by prompt length, in tokens arm 16 32 64" in shown
    assert "exact 0.0000 0.0000 0.0000 100.0% 100.0% 100.0%" in shown
