"""What a choice looks like as a recipe: every layer has the format that was chosen."""

from __future__ import annotations

import random

import pytest
import tiny_models

import mixquant
from mixquant.core.recipe import FormatName, Recipe
from mixquant.engines.transformers.module import PhaseLinear
from mixquant.tune.choice import Choice
from mixquant.tune.units import Unit, units_of

FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8", "bf16")


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen3_5", "qwen3_moe"])
def test_a_prepared_model_has_the_formats(architecture: str) -> None:
    model = tiny_models.build(architecture)
    found = units_of(model, ("nvfp4", "fp8"))
    chosen = random.Random(3).choices(FORMATS, k=len(found))
    recipe = Choice(tuple(chosen), "4/6", 4, 32).recipe(found, "nvfp4")
    mixquant.prepare(model, Recipe.from_json(recipe.to_json()))
    made = mixquant.summary(model)
    assert (made.recipe.precise_head, made.recipe.precise_tail) == (4, 32)
    for unit, fmt in zip(found.chosen, chosen, strict=True):
        layer = model.get_submodule(unit.layer)
        if not isinstance(layer, PhaseLinear):  # nothing of it is quantized
            assert fmt == "bf16"
            continue
        start, stop = unit.features
        formats = [
            part.format
            for part in layer.parts
            if part.features[0] < stop and start < part.features[1]
        ]
        assert formats == [fmt]
    fused = [unit for unit in found.chosen if unit.name != unit.layer]
    assert bool(fused) == (architecture == "phi3")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.7.mlp.up_proj", "*.layers.7.mlp.up_proj"),
        ("model.language_model.layers.17.mlp.up_proj", "*.layers.17.mlp.up_proj"),
        ("layers.7.mlp.up_proj", "layers.7.mlp.up_proj"),
        ("lm_head", "lm_head"),
        ("model.up_proj", "model.up_proj"),
    ],
)
def test_patterns(name: str, pattern: str) -> None:
    assert Unit(name, name, (0, 1), 1).pattern == pattern
