"""What the table says of patches: how often they took, and why not elsewhere."""

from __future__ import annotations

from vllm_engines import require_vllm

require_vllm()

from mixquant.core.recipe import Recipe  # noqa: E402
from mixquant.core.summary import Summary  # noqa: E402
from mixquant.engines.vllm.patches.outcome import Outcome, lines_of  # noqa: E402


def test_a_patch_that_took_everywhere_gives_no_reason() -> None:
    outcome = Outcome("norms fused", (None,) * 72)
    assert (outcome.taken, str(outcome)) == (72, "norms fused 72 of 72")


def test_reasons_are_counted() -> None:
    outcome = Outcome("norms fused", (None, "no kernel", "LoRA", "no kernel"))
    assert str(outcome) == "norms fused 1 of 4 (1: LoRA; 2: no kernel)"
    assert str(Outcome.nowhere("norms fused", 3, "LoRA")) == "norms fused 0 of 3 (3: LoRA)"


def test_what_has_no_place_has_no_line_unless_it_says_why() -> None:
    took, nowhere = Outcome("norms fused", (None,)), Outcome("attention in FP8:", ())
    graphs = Outcome.no_place("quantized CUDA graphs:", "LoRA is on")
    assert lines_of([took, nowhere, graphs]) == (
        "norms fused 1 of 1",
        "quantized CUDA graphs: none (LoRA is on)",
    )


def test_the_table_shows_the_lines() -> None:
    recipe = Recipe(preset="exact").resolved(frozenset())
    lines = ("norms fused 72 of 72", "activations fused 36 of 36")
    printed = str(Summary(recipe, (), lines))
    assert all(line in printed for line in lines)
