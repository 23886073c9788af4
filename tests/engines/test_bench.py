"""`mixquant bench --engine transformers`, on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixquant import cli, results


@pytest.mark.slow
def test_three_arms_in_process(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", model, "--engine", "transformers", "--json", str(file)]
    arguments += ["--lengths", "20,300", "--output-tokens", "3", "--repeats", "2"]
    assert cli.main([*arguments, "--recipe", '{"format": "int8"}']) == 0
    bench = results.read(file)
    assert isinstance(bench, results.Bench)
    assert [arm.name for arm in bench.arms] == ["bf16", "quantized", "mixquant"]
    assert bench.command.startswith("mixquant bench ")
    assert bench.settings["output_tokens"] == 3
    found = {(f.arm, f.tokens, f.metric): f for f in bench.results}
    for arm in ("bf16", "quantized", "mixquant"):
        for tokens in (20, 300):
            ttft, e2e = found[arm, tokens, "ttft"], found[arm, tokens, "e2e"]
            assert ttft.lowest is not None and 0 < ttft.lowest <= ttft.value < e2e.value
            assert found[arm, tokens, "tpot"].value > 0
    # By the rule: a prompt of 20 is too short, and of a longer one the last token stays precise.
    shares = {(a, t): f.value for (a, t, metric), f in found.items() if metric == "quantized"}
    assert shares == {
        ("quantized", 20): 1.0,
        ("quantized", 300): 1.0,
        ("mixquant", 20): 0.0,
        ("mixquant", 300): pytest.approx(299 / 300),
    }
    printed = capsys.readouterr().out
    assert "By prompt length" in printed and "99%" not in printed.split("mixquant")[0]
