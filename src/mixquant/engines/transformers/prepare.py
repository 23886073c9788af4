"""`prepare`: makes a loaded Transformers model phase-aware, and known to Transformers as such."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixquant.core.recipe import Recipe
from mixquant.engines.transformers.convert import as_recipe, convert
from mixquant.engines.transformers.description import summary
from mixquant.engines.transformers.module import phase_linears
from mixquant.engines.transformers.quantizer import attach


def prepare(
    model: PreTrainedModel, recipe: Recipe | dict[str, Any] | str = "balanced"
) -> PreTrainedModel:
    """Makes a loaded model run prefill in the recipe's format and decode in its own precision.

    Afterwards `generate` applies the rule by itself. `mixquant.phase` sets the phase of direct calls of
    the model. The weights stay as they are; the quantized copy comes on top (`mixquant.summary` says how
    large it is). An error leaves the model unchanged.

    Args:
        model: a decoder-only model with `generate`, its weights in BF16, FP16 or FP32 on a device.
        recipe: a `Recipe`, its fields as a dict, or what `Recipe.load` takes (``balanced``, ...).

    Returns:
        The same model.

    Raises:
        RecipeError: an invalid recipe.
        PrepareError: a model that is prepared or quantized already, is not decoder-only, is not on
            a device, has no linear layers, or has a NaN or an infinity in a weight (the message names
            the layer); a recipe with a role, which only a vLLM engine can have.
        CheckpointError: the recipe's prefill_model cannot be read, or is of another model.
    """
    recipe = as_recipe(recipe)
    convert(model, recipe)
    attach(model, recipe)
    return model


def requantize(model: nn.Module) -> None:
    """Makes every quantized copy of a prepared model again, from its present weights.

    Call it after a change that the model does not notice by itself: of single elements of a weight,
    through ``weight.data``. The model notices other changes when the next prefill begins.

    Raises:
        PrepareError: the model is not prepared, or a weight is not in memory or holds NaN or infinity.
    """
    layers = phase_linears(model)
    if not layers:
        summary(model)  # raises, but for a model whose recipe quantizes nothing
    for layer in layers:
        layer.requantize()
