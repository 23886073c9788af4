"""Which linear layers of a model see token rows, and in which format each part of each is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.layer_names import FUSED_PROJECTIONS, is_router
from mixquant.core.phase import Range
from mixquant.core.recipe import FormatName, Recipe, most_precise
from mixquant.core.summary import IGNORED, THE_RECIPE
from mixquant.engines.source import statements_of_forward
from mixquant.formats import BY_NAME

Layout = tuple[tuple[Range, str, dict[str, Any]], ...]

EXPERTS = re.compile(r"(^|\.)experts(\.|$)")

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


def token_modules(model: PreTrainedModel, decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What token rows go through: the text decoder and the output head.

    A vision or audio tower has rows of its own; its products are precise whatever the plan.
    """
    inside = {id(module) for module in decoder.modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if id(module) in inside or module is head:
            yield name, module


def linears(model: PreTrainedModel, decoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    # The last adapter's around a linear layer (PEFT's), which is named like the layer.
    wrapper = "/"
    for name, module in token_modules(model, decoder):
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            wrapper = name
        elif name == f"{wrapper}.base_layer":
            name = wrapper
        elif name.startswith(f"{wrapper}."):
            continue  # the adapter's own, which is small and may be trained
        if type(module) is nn.Linear:
            yield name, module


def layout_of(
    name: str, linear: nn.Linear, recipe: Recipe, model: PreTrainedModel
) -> tuple[Layout, str | None]:
    """The parts of a layer and their formats, and if it stays BF16, why.

    Raises:
        CheckpointError: the recipe's prefill_model cannot be read.
    """
    out_features, in_features = linear.weight.shape
    whole = (0, out_features)
    precise: Layout = ((whole, "bf16", {}),)
    if any(recipe.ignores(one) for one in names_in_recipes(name, linear, model)):
        return precise, IGNORED
    if "forward" in vars(
        linear
    ):  # accelerate's hooks, compressed-tensors: ours would never be called
        return precise, "another library has replaced its forward"
    if is_router(name):
        return precise, "an expert router"
    if EXPERTS.search(name):
        return precise, "experts see rows in an order of their own"

    formats = recipe.formats_of_fused(name)
    boundaries = _boundaries(name, out_features, model) if formats else None
    if formats is None or len(set(formats)) == 1:
        pieces = [(whole, formats[0] if formats else _format_of(recipe, name, linear, model))]
    elif boundaries is None:
        # Where the projections lie is not known: the whole layer as precise as its most precise one.
        pieces = [(whole, most_precise(formats))]
    else:
        pieces = list(zip(boundaries, formats, strict=True))

    layout: Layout = ()
    reasons: list[str] = []
    if recipe.prefill_model is not None:
        source = opened(recipe.prefill_model)
        if source.format_of(name) is None:
            reasons.append("not quantized in the prefill model")
        pieces = [(features, source.chosen(name, fmt)) for features, fmt in pieces]
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


def _format_of(recipe: Recipe, name: str, linear: nn.Linear, model: PreTrainedModel) -> FormatName:
    """By the name that a recipe has a format for, if it has one for any of the layer's names."""
    default = recipe.format_of("")
    chosen = map(recipe.format_of, names_in_recipes(name, linear, model))
    return next((fmt for fmt in chosen if fmt != default), recipe.format_of(name))


def names_in_recipes(name: str, linear: nn.Linear, model: PreTrainedModel) -> tuple[str, ...]:
    """A layer's name, and for the output head the one by which recipes know it."""
    return (name, "lm_head") if linear is model.get_output_embeddings() else (name,)


def projections(
    name: str, linear: nn.Linear, model: PreTrainedModel
) -> tuple[tuple[str, Range], ...]:
    """The projections in a layer: their full names and output features. Itself if it is not fused,
    or if it is not known where they lie."""
    path, _, last = name.rpartition(".")
    whole = (0, linear.weight.shape[0])
    boundaries = _boundaries(name, whole[1], model)
    if boundaries is None:
        return ((name, whole),)
    parts = FUSED_PROJECTIONS[last]
    return tuple(
        (f"{path}.{part}" if path else part, features)
        for part, features in zip(parts, boundaries, strict=True)
    )


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
