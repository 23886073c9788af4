"""`prepare`: makes a loaded Transformers model phase-aware, in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from mixquant.core.phase import Range, Thresholds
from mixquant.core.recipe import FUSED_PROJECTIONS, Recipe, is_router
from mixquant.core.rows import Part
from mixquant.core.summary import IGNORED, THE_RECIPE, Layer, Summary
from mixquant.engines.source import statements_of_forward
from mixquant.engines.transformers.fusion import fuse
from mixquant.engines.transformers.module import (
    PhaseLinear,
    PrepareError,
    phase_linears,
    quantize_parts,
    refuse_unfit,
)
from mixquant.engines.transformers.passes import watch
from mixquant.engines.transformers.stored import is_other_linear, why_not_plain
from mixquant.engines.transformers.trial import OTHER_ROWS, why_not_its_rows
from mixquant.formats import BY_NAME, native_formats, why_not_on
from mixquant.hardware import cuda_capability

logger = logging.getLogger(__name__)

Layout = tuple[tuple[Range, str, dict[str, Any]], ...]

_GONE = "another module has taken its place"
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")

# What a module's forward does with a fused layer whose projections lie one behind the other.
_ONE_BEHIND_THE_OTHER: dict[str, tuple[str, ...]] = {
    "qkv_proj": (
        "qkv = self.qkv_proj(hidden_states)",
        "query_pos = self.config.num_attention_heads * self.head_dim",
        "query_states = qkv[..., :query_pos]",
        "key_states = qkv[..., query_pos:query_pos + self.num_key_value_heads * self.head_dim]",
        "value_states = qkv[..., query_pos + self.num_key_value_heads * self.head_dim:]",
    ),
    "gate_up_proj": (
        "up_states = self.gate_up_proj(hidden_states)",
        "gate, up_states = up_states.chunk(2, dim=-1)",
    ),
}


def prepare(
    model: PreTrainedModel, recipe: Recipe | dict[str, Any] | str = "balanced"
) -> PreTrainedModel:
    """Makes a loaded model run prefill in the recipe's format and decode in its own precision.

    Afterwards `generate` applies the rule by itself; around direct calls of the model say the phase
    with `mixquant.phase`. The weights stay as they are; the quantized copy comes on top
    (`mixquant.summary` says how large it is). Nothing is changed if an error is raised.

    Args:
        model: a decoder-only model with `generate`, its weights in BF16, FP16 or FP32 on a device.
        recipe: a `Recipe`, its fields as a dict, or what `Recipe.load` takes (``balanced``, ...).

    Returns:
        The same model.

    Raises:
        RecipeError: an invalid recipe.
        PrepareError: a model that is prepared or quantized already, is not decoder-only, is not on
            a device, has no linear layers, or has a NaN or an infinity in a weight (the message names
            the layer); a recipe with a role or a prefill_model, which only a vLLM engine can have.
    """
    recipe = as_recipe(recipe)
    if recipe.role != "both":
        raise PrepareError(
            f"role {recipe.role!r} is for the vLLM engines of a disaggregated set; here one model does "
            "both phases, so leave it out"
        )
    if recipe.prefill_model is not None:
        raise PrepareError(
            f"prefill_model {recipe.prefill_model!r} is for vLLM engines; here the copy is made from "
            "the model's own weights, so leave it out"
        )
    _check(model)
    decoder = model.get_decoder()
    device = decoder.device
    resolved = recipe.resolved(native_formats(device))
    _check_linears(model, decoder, resolved)
    _refuse_device(device, resolved)

    plans: list[tuple[str, nn.Linear, Layout, tuple[Part, ...], str | None]] = []
    layers: list[Layer] = []
    candidates = list(_linears(model, decoder))
    strange = why_not_its_rows(model, candidates) if _quantizes(resolved) else {}
    described = f"Quantizing the prefill copy ({', '.join(_formats_used(resolved))})"
    for name, linear in hf_logging.tqdm(candidates, desc=described, leave=False):
        layout, why = _layout(name, linear, resolved, model)
        if name in strange and any(fmt != "bf16" for _, fmt, _ in layout):
            layout, why = (((0, len(linear.weight)), "bf16", {}),), strange[name]
        if all(fmt == "bf16" for _, fmt, _ in layout):
            layers.append(_layer(name, linear.weight.shape, Part((0, 0), "bf16", None), why))
            continue
        refuse_unfit(name, linear.weight)
        parts = quantize_parts(linear.weight, layout)
        plans.append((name, linear, layout, parts, why))
        layers.extend(_described(name, linear.weight, layout, parts, why))
    layers.extend(_left_alone(model, decoder))
    if OTHER_ROWS in strange.values() and not plans:
        raise PrepareError(
            f"the linear layers of {type(model).__name__} are not given one row for each token of a "
            "pass, so no row's phase is known; use the model without mixquant"
        )
    made = Summary(resolved, tuple(layers))
    _warn(model, recipe, made)

    for name, linear, layout, parts, why in plans:
        PhaseLinear.adopt(linear, name, layout, why).hold(parts)
    fuse(model)
    watch(
        model,
        Thresholds(
            min_prefill_tokens=resolved.min_prefill_tokens,
            precise_head=resolved.precise_head or 0,
            precise_tail=resolved.precise_tail,
        ),
        everywhere=resolved.everywhere,
    )
    model.mixquant_summary = made  # type: ignore[assignment]
    from mixquant.engines.transformers.quantizer import attach

    attach(model, recipe)
    return model


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
        for line in _described(
            layer.name, layer.weight, layer.layout, layer.parts, layer.why_precise
        )
    }
    lines = []
    for line in found.layers:
        if line.name in now:
            line = now[line.name]
        elif line.format != "bf16":
            line = _layer(line.name, line.shape, Part((0, 0), "bf16", None), _GONE)
        lines.append(line)
    return replace(found, layers=tuple(lines))


def requantize(model: nn.Module) -> None:
    """Makes every quantized copy of a prepared model again, from its weights as they are now.

    Needed after a change that the model does not notice by itself: of single elements of a weight,
    through ``weight.data``. Others it notices when the next prefill begins.

    Raises:
        PrepareError: the model is not prepared, or a weight is not in memory or holds NaN or infinity.
    """
    layers = phase_linears(model)
    if not layers:
        summary(model)  # raises, but for a model whose recipe quantizes nothing
    for layer in layers:
        layer.requantize()


def as_recipe(recipe: Recipe | dict[str, Any] | str) -> Recipe:
    """A recipe from whatever stands for one. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, str) else Recipe.from_dict(recipe)


def _check(model: PreTrainedModel) -> None:
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
    inside = dict(_token_modules(model, decoder))
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


def _token_modules(model: PreTrainedModel, decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What token rows go through: the text decoder and the output head.

    A vision or audio tower has rows of its own; its products are precise whatever the plan.
    """
    inside = {id(module) for module in decoder.modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if id(module) in inside or module is head:
            yield name, module


def _linears(model: PreTrainedModel, decoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    # The last adapter's around a linear layer (PEFT's), which is named like the layer.
    wrapper = "/"
    for name, module in _token_modules(model, decoder):
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            wrapper = name
        elif name == f"{wrapper}.base_layer":
            name = wrapper
        elif name.startswith(f"{wrapper}."):
            continue  # the adapter's own, which is small and may be trained
        if type(module) is nn.Linear:
            yield name, module


def _layout(
    name: str, linear: nn.Linear, recipe: Recipe, model: PreTrainedModel
) -> tuple[Layout, str | None]:
    """The parts of a layer and their formats, and if it stays BF16, why."""
    out_features, in_features = linear.weight.shape
    whole = (0, out_features)
    precise: Layout = ((whole, "bf16", {}),)
    if any(recipe.ignores(one) for one in _names(name, linear, model)):
        return precise, IGNORED
    if "forward" in vars(
        linear
    ):  # accelerate's hooks, compressed-tensors: ours would never be called
        return precise, "another library has replaced its forward"
    if is_router(name):
        return precise, "an expert router"
    if _EXPERTS.search(name):
        return precise, "experts see rows in an order of their own"

    formats = recipe.formats_of_fused(name)
    boundaries = _boundaries(name, out_features, model) if formats else None
    if formats is None or len(set(formats)) == 1:
        pieces = [(whole, recipe.format_of(name) if formats is None else formats[0])]
    elif boundaries is None:
        # Where the projections lie is not known: the whole layer as precise as its most precise one.
        order = ("bf16", "fp8", "int8", "nvfp4")
        pieces = [(whole, min(formats, key=order.index))]
    else:
        pieces = list(zip(boundaries, formats, strict=True))

    layout: Layout = ()
    reasons: list[str] = []
    for (start, stop), fmt in pieces:
        options: dict[str, Any] = {"block_scale": recipe.block_scale} if fmt == "nvfp4" else {}
        if fmt != "bf16":
            kernel = BY_NAME[fmt].kernel(linear.weight.device)
            reason = BY_NAME[fmt].why_not(stop - start, in_features, kernel)
            if reason is not None:
                reasons.append(f"{fmt} cannot hold it: {reason}")
                fmt, options = "bf16", {}
        layout += (((start, stop), fmt, options),)
    return layout, "; ".join(dict.fromkeys(reasons)) or THE_RECIPE


def _names(name: str, linear: nn.Linear, model: PreTrainedModel) -> tuple[str, ...]:
    """A layer's name, and for the output head the one by which recipes know it."""
    return (name, "lm_head") if linear is model.get_output_embeddings() else (name,)


def _boundaries(name: str, out_features: int, model: PreTrainedModel) -> list[Range] | None:
    """Where in a fused layer's output its projections lie, or None if that is not known."""
    path, _, last = name.rpartition(".")
    known = _ONE_BEHIND_THE_OTHER.get(last)
    does = statements_of_forward(type(model.get_submodule(path)))
    if known is None or not set(known) <= set(does):
        return None  # CodeGen and MiniMax interleave them
    if last == "gate_up_proj":
        return [(0, out_features // 2), (out_features // 2, out_features)]
    config = model.config.get_text_config()
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    size = out_features // (queries + 2 * keys)
    if size * (queries + 2 * keys) != out_features:
        return None
    ends = [0, queries * size, (queries + keys) * size, out_features]
    return list(pairwise(ends))


def _left_alone(model: PreTrainedModel, decoder: nn.Module) -> Iterator[Layer]:
    """Matrices that rows are multiplied with outside plain linear layers: experts, routers, others."""
    precise = Part((0, 0), "bf16", None)
    for name, module in _token_modules(model, decoder):
        if is_other_linear(module):
            why = f"a {type(module).__name__}, not torch.nn.Linear"
            yield _layer(name, module.weight.shape, precise, why)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if _EXPERTS.search(name) and parameter.ndim == 3:
                why = "experts are not linear layers in Transformers"
                yield _layer(f"{name}.{key}", parameter.shape, precise, why)
            elif is_router(name) and parameter.ndim == 2:
                yield _layer(name, parameter.shape, precise, "an expert router")


def _described(
    name: str, weight: torch.Tensor, layout: Layout, parts: tuple[Part, ...], why: str | None
) -> Iterator[Layer]:
    """The lines of a layer in the summary, one for each part; ``why`` its BF16 ones are BF16."""
    labels = FUSED_PROJECTIONS.get(name.rpartition(".")[2], ()) if len(parts) > 1 else ()
    for index, (part, (_, fmt, _)) in enumerate(zip(parts, layout, strict=True)):
        label = f"{name}.{labels[index]}" if labels else name
        shape = (part.features[1] - part.features[0], weight.shape[1])
        left = part.weight is None and fmt != "bf16"  # moved since it was laid out
        reason = f"{fmt} cannot hold it on {weight.device.type}" if left else why
        yield _layer(label, shape, part, reason)


def _layer(name: str, shape: Any, part: Part, why: str | None) -> Layer:
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


def _quantizes(recipe: Recipe) -> bool:
    return set(_formats_used(recipe)) != {"bf16"}


def _formats_used(recipe: Recipe) -> list[str]:
    assert isinstance(recipe.format, dict)
    return sorted(set(recipe.format.values()))


def _warn(model: PreTrainedModel, recipe: Recipe, made: Summary) -> None:
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
        if isinstance(module, nn.Linear) or _EXPERTS.search(name)
    }
    free: list[str] = []
    for name, linear in _linears(model, model.get_decoder()):
        if not is_router(name) and not _EXPERTS.search(name):
            path, _, last = name.rpartition(".")
            members = [f"{path}.{part}" for part in FUSED_PROJECTIONS.get(last, ())]
            free += [*_names(name, linear, model), *members]
    return free, [*(every - set(free)), *(layer.name for layer in made.layers)]
