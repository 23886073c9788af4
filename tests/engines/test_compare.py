"""The main job, on a real model; times are measured but not judged here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant import cli, results
from mixquant.evaluate.compare import run as compare
from mixquant.kernels.cpu.attention import why_unavailable
from mixquant.report import page


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PREFILL_ROUNDS", 1)  # no test looks at times


def _compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["compare", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_compare(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    printed = _compare(capsys, model, "--json", str(file), "--max-new-tokens", "12")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    result = json.loads(file.read_text())
    read = results.read(file)
    assert isinstance(read, results.Comparison)
    assert results.to_json(read) == file.read_text()
    assert result["kind"] == "comparison"
    assert result["command"] == f"mixquant compare {model} --json {file} --max-new-tokens 12"
    assert result["environment"]["versions"]["torch"] == torch.__version__

    assert result["model"] == model
    assert result["device"] in ("cpu", "cuda")
    assert result["format"] in ("int8", "fp8", "nvfp4")
    arms: dict[str, dict[str, Any]] = {arm["name"]: arm for arm in result["arms"]}
    assert [name for name in arms if name != "attention"] == ["bf16", "quantized", "mixquant"]
    bf16, quantized, mixquant = (arms[name] for name in ("bf16", "quantized", "mixquant"))
    if torch.cuda.is_available() or why_unavailable("bf16") is not None:
        assert "attention" not in arms
    else:
        assert arms["attention"]["extra_bytes"] == 0
        assert arms["attention"]["quantized_prefill_tokens"] == 0
        assert arms["attention"]["kl_mean"] < mixquant["kl_mean"]
    for arm in arms.values():
        assert arm["prefill_tokens"] == bf16["prefill_tokens"] >= 3000
        assert arm["ttft_s"] == pytest.approx(sum(arm["ttft_s_per_turn"]))
        assert arm["prefill_tokens_per_s"] == pytest.approx(arm["prefill_tokens"] / arm["ttft_s"])
        assert arm["tpot_s"] > 0
        assert 0 <= arm["top1_agreement"] <= 1
        assert arm["text"]
        assert arm["name"] in printed
        assert arm["text"].split()[0] in printed
    assert result["prompt_tokens_per_turn"][0] < bf16["prefill_tokens"]
    assert bf16["text"] == result["answers"][-1]

    # A model without mixquant, doing the same twice.
    assert bf16["kl_mean"] == 0
    assert bf16["top1_agreement"] == 1
    assert bf16["extra_bytes"] == bf16["quantized_prefill_tokens"] == 0

    assert quantized["extra_bytes"] == mixquant["extra_bytes"] > 0
    assert quantized["quantized_prefill_tokens"] == quantized["prefill_tokens"]
    # The further questions are shorter than min_prefill_tokens; of the first, all but the tail.
    first, *further = result["prompt_tokens_per_turn"]
    assert max(further) < 128
    assert mixquant["quantized_prefill_tokens"] == first - 1
    assert 0 < mixquant["kl_mean"] < quantized["kl_mean"]


def test_some_arms_of_a_text_of_ones_own(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, file = tmp_path / "text", tmp_path / "results.json"
    text.write_text("The harvest was poor, so the price of bread has doubled.")
    printed = _compare(
        capsys,
        model,
        *("--arms", "mixquant", "--prompt-file", str(text), "--json", str(file)),
        *("--recipe", "exact", "--max-new-tokens", "1"),
        *("--report", str(tmp_path / "report.html")),
    )
    assert re.search(r"^ *mixquant +bf16 +\d", printed, re.MULTILINE)
    assert not re.search(r"^ *quantized +bf16 +\d", printed, re.MULTILINE)
    html = (tmp_path / "report.html").read_text()
    assert html == page([(None, results.read(file))])
    assert html.count("<figure") == 3  # no time of a token after the first
    (arm,) = json.loads(file.read_text())["arms"]
    assert arm["name"] == "mixquant"
    assert arm["tpot_s"] is None  # the first token of an answer comes out of prefill
    assert arm["prefill_tokens"] < 500
    assert arm["quantized_prefill_tokens"] == arm["extra_bytes"] == 0
