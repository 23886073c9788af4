"""What was done to each layer of a model, in lines for people."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixquant.core.layer_names import FUSED_PROJECTIONS, is_router
from mixquant.core.recipe import Recipe
from mixquant.core.rows import Part
from mixquant.core.summary import Layer, Summary
from mixquant.engines.transformers.layout import (
    EXPERTS,
    Layout,
    linears,
    names_in_recipes,
    token_modules,
)
from mixquant.engines.transformers.module import PrepareError, phase_linears
from mixquant.engines.transformers.stored import is_other_linear

logger = logging.getLogger(__name__)

_GONE = "another module has taken its place"


def summary(model: nn.Module) -> Summary:
    """What `prepare` did to each layer: format, kernel, extra memory. Prints as a table.

    Of the quantized copies as they are now: on another device, say, their kernel is another.

    Raises:
        PrepareError: the model is not prepared.
    """
    found = getattr(model, "mixquant_summary", None)
    if not isinstance(found, Summary):
        raise PrepareError(
            f"this {type(model).__name__} is not prepared; call mixquant.prepare(model)"
        )
    now = {
        line.name: line
        for layer in phase_linears(model)
        for line in describe(layer.name, layer.weight, layer.layout, layer.parts, layer.why_precise)
    }
    lines = []
    for line in found.layers:
        if line.name in now:
            line = now[line.name]
        elif line.format != "bf16":
            line = layer_line(line.name, line.shape, Part((0, 0), "bf16", None), _GONE)
        lines.append(line)
    return replace(found, layers=tuple(lines))


def left_alone(model: PreTrainedModel, decoder: nn.Module) -> Iterator[Layer]:
    """Matrices that rows are multiplied with outside plain linear layers: experts, routers, others."""
    precise = Part((0, 0), "bf16", None)
    for name, module in token_modules(model, decoder):
        if is_other_linear(module):
            why = f"a {type(module).__name__}, not torch.nn.Linear"
            yield layer_line(name, module.weight.shape, precise, why)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if EXPERTS.search(name) and parameter.ndim == 3:
                why = "experts are not linear layers in Transformers"
                yield layer_line(f"{name}.{key}", parameter.shape, precise, why)
            elif is_router(name) and parameter.ndim == 2:
                yield layer_line(name, parameter.shape, precise, "an expert router")


def describe(
    name: str, weight: torch.Tensor, layout: Layout, parts: tuple[Part, ...], why: str | None
) -> Iterator[Layer]:
    """The lines of a layer in the summary, one for each part; ``why`` its BF16 ones are BF16."""
    labels = FUSED_PROJECTIONS.get(name.rpartition(".")[2], ()) if len(parts) > 1 else ()
    for index, (part, (_, fmt, _)) in enumerate(zip(parts, layout, strict=True)):
        label = f"{name}.{labels[index]}" if labels else name
        shape = (part.features[1] - part.features[0], weight.shape[1])
        left = part.weight is None and fmt != "bf16"  # moved since it was laid out
        reason = f"{fmt} cannot hold it on {weight.device.type}" if left else why
        yield layer_line(label, shape, part, reason)


def layer_line(name: str, shape: Any, part: Part, why: str | None) -> Layer:
    weight = part.weight
    return Layer(
        name=name,
        shape=tuple(shape),
        format=part.format,
        kernel=weight.kernel.name if weight else "torch",
        native=weight.kernel.native if weight else True,
        nbytes=weight.nbytes if weight else 0,
        why_precise=None if weight else why,
    )


def warn_of_no_effect(model: PreTrainedModel, recipe: Recipe, made: Summary) -> None:
    """Says what the recipe asks for and does not get."""
    sentences = recipe.settings_without_effect(made.recipe)
    sentences += recipe.patterns_without_effect(*_names_of_linears(model, made))
    if recipe.prefill_attention == "fp8":
        sentences.append(
            "recipe key 'prefill_attention': fp8 is for vLLM engines; attention is in the model's own "
            "precision here"
        )
    if (why := made.why_nothing()) is not None:
        sentences.append(why)
    for sentence in sentences:
        logger.warning("mixquant: %s (%s)", sentence, type(model).__name__)


def _names_of_linears(model: PreTrainedModel, made: Summary) -> tuple[list[str], list[str]]:
    """The names that patterns may mean: of layers with a choice of format, and of all others."""
    every = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or EXPERTS.search(name)
    }
    free: list[str] = []
    for name, linear in linears(model, model.get_decoder()):
        if not is_router(name) and not EXPERTS.search(name):
            path, _, last = name.rpartition(".")
            members = [f"{path}.{part}" for part in FUSED_PROJECTIONS.get(last, ())]
            free += [*names_in_recipes(name, linear, model), *members]
    return free, [*(every - set(free)), *(layer.name for layer in made.layers)]
