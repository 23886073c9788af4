"""Makes a loaded model phase-aware in place: checks it, quantizes its layers, swaps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from mixquant.checkpoints.second_checkpoint import check_fits, with_format_of
from mixquant.core.phase import Thresholds
from mixquant.core.recipe import Recipe
from mixquant.core.rows import Part
from mixquant.core.summary import Layer, Summary
from mixquant.engines.transformers import attention
from mixquant.engines.transformers.description import (
    describe,
    layer_line,
    left_alone,
    warn_of_no_effect,
)
from mixquant.engines.transformers.fusion import fuse
from mixquant.engines.transformers.layout import Layout, layout_of, linears, token_modules
from mixquant.engines.transformers.module import (
    PhaseLinear,
    PrepareError,
    quantize_parts,
    refuse_unfit,
)
from mixquant.engines.transformers.passes import watch
from mixquant.engines.transformers.stored import why_not_plain
from mixquant.engines.transformers.trial import OTHER_ROWS, why_not_its_rows
from mixquant.formats import native_formats, why_not_on
from mixquant.hardware import cuda_capability


def convert(model: PreTrainedModel, recipe: Recipe) -> None:
    """Does to a model what `prepare` says, but for what Transformers knows of it.

    Raises:
        PrepareError, CheckpointError, RecipeError: as `prepare` does, before anything is changed.
    """
    if recipe.role != "both":
        raise PrepareError(
            f"role {recipe.role!r} is for the vLLM engines of a disaggregated set; here one model does "
            "both phases, so leave it out"
        )
    _check_model(model)
    given = recipe
    if recipe.prefill_model is not None:
        check_fits(recipe.prefill_model, model.config.to_dict(), model.name_or_path)
        recipe = with_format_of(recipe)
    decoder = model.get_decoder()
    device = decoder.device
    resolved = recipe.resolved(native_formats(device), device.type == "cuda")
    _check_linears(model, decoder, resolved)
    _refuse_device(device, resolved)

    chosen: list[tuple[str, nn.Linear, Layout, tuple[Part, ...], str | None]] = []
    layers: list[Layer] = []
    candidates = list(linears(model, decoder))
    strange: dict[str, str] = {}
    with attention.modules_that_attend() as attending:
        if _quantizes(resolved) or attention.wants_kernel(model, resolved):
            strange = why_not_its_rows(model, candidates)
    progress = f"Quantizing the prefill copy ({', '.join(_formats_used(resolved))})"
    for name, linear in hf_logging.tqdm(candidates, desc=progress, leave=False):
        layout, why = layout_of(name, linear, resolved, model)
        if name in strange and any(fmt != "bf16" for _, fmt, _ in layout):
            layout, why = (((0, len(linear.weight)), "bf16", {}),), strange[name]
        if all(fmt == "bf16" for _, fmt, _ in layout):
            layers.append(layer_line(name, linear.weight.shape, Part((0, 0), "bf16", None), why))
            continue
        refuse_unfit(name, linear.weight)
        parts = quantize_parts(linear.weight, layout, name, resolved.prefill_model)
        chosen.append((name, linear, layout, parts, why))
        layers.extend(describe(name, linear.weight, layout, parts, why))
    layers.extend(left_alone(model, decoder))
    if OTHER_ROWS in strange.values() and not chosen:
        raise PrepareError(
            f"the linear layers of {type(model).__name__} are not given one row for each token of a "
            "pass, so no row's phase is known; use the model without mixquant"
        )
    attends = attention.choose(model, resolved, attending)
    made = Summary(resolved, tuple(layers), (attends,) if attends else ())
    warn_of_no_effect(model, given, made)

    for name, linear, layout, parts, why in chosen:
        PhaseLinear.adopt(linear, name, layout, why, resolved.prefill_model).set_copy(parts)
    fuse(model)
    watch(
        model,
        Thresholds(
            min_prefill_tokens=resolved.min_prefill_tokens or 0,
            precise_head=resolved.precise_head or 0,
            precise_tail=resolved.precise_tail,
        ),
        everywhere=resolved.everywhere,
    )
    model.mixquant_summary = made  # type: ignore[assignment]


def _check_model(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise PrepareError(
            f"expected a Transformers model with generate (AutoModelForCausalLM), got {kind}"
        )
    if isinstance(getattr(model, "mixquant_summary", None), Summary):
        raise PrepareError(f"this {kind} is prepared already; load it again to change the recipe")
    if model.config.is_encoder_decoder:
        raise PrepareError(
            f"{kind} is an encoder-decoder model; mixquant handles decoder-only ones"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise PrepareError(
                f"the weight {name} is not in memory (offloaded); load the model without offloading"
            )


def _check_linears(model: PreTrainedModel, decoder: nn.Module, resolved: Recipe) -> None:
    kind = type(model).__name__
    inside = dict(token_modules(model, decoder))
    if (why := why_not_plain(inside.items())) is not None:
        quantizer: Any = getattr(model, "hf_quantizer", None)
        method = getattr(quantizer, "quantization_config", None) and (
            quantizer.quantization_config.quant_method
        )
        by = f" by {getattr(method, 'value', method)}" if method else ""
        raise PrepareError(
            f"this {kind} is quantized already{by}, or not in plain tensors ({why}); mixquant needs "
            "the weights in BF16, FP16 or FP32"
        )
    head = model.get_output_embeddings()
    if set(_formats_used(resolved)) != {"bf16"} and not any(
        type(module) is nn.Linear and module is not head for module in inside.values()
    ):
        raise PrepareError(
            f"the decoder of {kind} holds no torch.nn.Linear, so nothing could be quantized; such "
            "models are served by vLLM, or here with preset exact"
        )


def _refuse_device(device: torch.device, resolved: Recipe) -> None:
    if device.type in ("cpu", "meta") or cuda_capability(device) != (0, 0):
        return
    for name in _formats_used(resolved):
        if name != "bf16" and (reason := why_not_on(name, device)) is not None:
            raise PrepareError(
                f"{device.type} does not compute {name} ({reason}); take another format, or preset "
                "exact for BF16"
            )


def _quantizes(recipe: Recipe) -> bool:
    return set(_formats_used(recipe)) != {"bf16"}


def _formats_used(recipe: Recipe) -> list[str]:
    assert isinstance(recipe.format, dict)
    return sorted(set(recipe.format.values()))


def as_recipe(recipe: Recipe | dict[str, Any] | str) -> Recipe:
    """A recipe from whatever stands for one. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, str) else Recipe.from_dict(recipe)
