"""Where nothing was quantized, commands say so and why, and print no ratio as a speed-up."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sample_results
from rich.console import Console
from rich.table import Table

from mixquant.bench.summary import gains
from mixquant.cli.hints import quantized_tokens, why_nothing_quantized
from mixquant.cli.tables import compare, fidelity, speed
from mixquant.core.recipe import Recipe
from mixquant.core.summary import Layer, Summary
from mixquant.results import Comparison, Fidelity

INT8 = {"format": {"default": "int8"}, "min_prefill_tokens": 128, "precise_tail": 1}


def summary(recipe: dict[str, Any], *formats: str) -> Summary:
    layers = [Layer("l", (64, 64), name, "kernel", True, 4096, None) for name in formats]
    return Summary(Recipe.from_dict(recipe), tuple(layers))


def printed(*tables: Table) -> str:
    console = Console(width=200, record=True)
    console.print(*tables)
    return console.export_text()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


@pytest.mark.parametrize(
    ("recipe", "formats", "tokens", "quantized", "says"),
    [
        (INT8, ["int8"], 36, 0, "0 in INT8: fewer than 128"),
        (INT8, ["int8"], 128, 0, "0 in INT8: fewer than 128 besides the 1 that stay in BF16"),
        (INT8, ["int8", "bf16"], 500, 499, "499 in INT8"),
        (INT8, ["nvfp4", "fp8"], 500, 499, "499 in NVFP4 and FP8"),
        (
            {"format": {"default": "bf16"}},
            ["bf16"],
            500,
            0,
            "0 quantized: the recipe keeps every layer in BF16",
        ),
        (INT8, ["bf16"], 500, 0, "0 quantized: no layer of this model can be quantized"),
    ],
)
def test_tokens_of_a_prompt(
    recipe: dict[str, Any], formats: list[str], tokens: int, quantized: int, says: str
) -> None:
    assert quantized_tokens(summary(recipe, *formats), tokens, quantized) == says


def test_a_recipe_that_is_not_known_gives_no_threshold() -> None:
    assert why_nothing_quantized(None, 36) == "no layer of this model can be quantized"
    assert why_nothing_quantized(INT8, 36) == "36 tokens are fewer than 128"


def test_comparison() -> None:
    whole = sample_results.comparison()
    assert "no speed-up" not in printed(compare.table(whole))
    assert re.search(r"\d\.\d\dx", row(printed(compare.table(whole)), "mixquant"))
    arms = tuple(
        arm.model_copy(update={"quantized_prefill_tokens": 0}) if arm.name == "mixquant" else arm
        for arm in whole.arms
    )
    update = {"arms": arms, "recipe": INT8, "prompt_tokens_per_turn": (57, 33)}
    none: Comparison = whole.model_copy(update=update)
    text = printed(compare.table(none))
    assert re.search(r"\d\.\d\dx", row(text, "quantized"))
    assert not re.search(r"\d\.\d\dx", row(text, "mixquant"))
    assert (
        "mixquant quantized no prompt token (57 tokens are fewer than 128): no speed-up is shown"
        in " ".join(text.split())
    )


def test_fidelity() -> None:
    whole = sample_results.fidelity()
    assert "no prompt token" not in printed(*fidelity.tables(whole))
    results = tuple(
        one.model_copy(update={"quantized_share": 0.0, "prompt_tokens": 64})
        if (one.arm, one.prompt_tokens) == ("mixquant", 512)
        else one
        for one in whole.results
    )
    arms = tuple(arm.model_copy(update={"recipe": INT8}) for arm in whole.arms)
    none: Fidelity = whole.model_copy(update={"results": results, "arms": arms})
    first = [one for one in none.results if one.prompt_tokens == 64]
    reference = first[0].model_copy(update={"arm": "bf16"})
    none = none.model_copy(update={"results": (reference, *first, *none.results)})
    text = " ".join(printed(*fidelity.tables(none)).split())
    assert text.count("mixquant quantized no prompt token: 64 tokens are fewer than 128.") == 1


def test_bench() -> None:
    def figures(share: float | None) -> list[Any]:
        found = []
        for arm, ms in (("bf16", 50.0), ("mixquant", 40.0)):
            found.append(sample_results.measurement(arm, "ttft", ms, tokens=64))
            found.append(sample_results.measurement(arm, "ttft", 4 * ms, tokens=512))
        shares = {64: share, 512: 0.9}
        for tokens, value in shares.items():
            if value is not None:
                options = {"tokens": tokens, "unit": "share"}
                found.append(sample_results.measurement("mixquant", "quantized", value, **options))
        return found

    for share, has_gain in ((0.0, False), (0.5, True), (None, True)):
        gained = gains(figures(share))
        assert (("mixquant", ("length", 64, None, 1), "ttft") in gained) == has_gain
        assert gained["mixquant", ("length", 512, None, 1), "ttft"] == 1.25
        text = printed(*speed.tables(figures(share)))
        assert text.count("1.25x") == 1 + has_gain
        assert ("there is no speed-up to show" in " ".join(text.split())) != has_gain
