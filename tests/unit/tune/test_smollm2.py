"""The whole command on SmolLM2, with few and short texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixquant import cli, results
from mixquant.core.recipe import Recipe


@pytest.mark.slow
def test_smollm2(smollm2_path: str, tmp_path: Path) -> None:
    recipe, frontier = tmp_path / "recipe.json", tmp_path / "frontier.json"
    command = ["tune", smollm2_path, "--target", "blackwell", "--recovered", "0.9"]
    command += ["--texts", "8", "--length", "256", "--answer-tokens", "32"]
    assert cli.main([*command, "--out", str(recipe), "--json", str(frontier)]) == 0
    found = results.read(frontier)
    assert isinstance(found, results.Tuning)
    tried = {one.arm: one for one in found.tried}
    plain, tuned = tried["plain"], tried["tuned"]
    assert plain.recovered is not None and tuned.recovered is not None and tuned.time is not None
    assert plain.recovered < 0.85 < 0.9 <= tuned.recovered
    assert tuned.time < 1.15
    for one in found.tried:
        if one.predicted is not None and one.searched is not None:
            assert 0.5 < one.searched / one.predicted < 2, one
    formats = Recipe.load(recipe).format
    assert isinstance(formats, dict) and {"nvfp4", "fp8"} <= set(formats.values())
