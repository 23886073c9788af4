"""The hint that a command prints if a prompt was read without quantizing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixquant.core.summary import Summary


def quantized_tokens(made: Summary, tokens: int, quantized: int) -> str:
    """How many tokens of a prompt were quantized, in which format, and why none, if none were."""
    recipe = made.recipe.to_dict()
    names = dict.fromkeys(layer.format for layer in made.layers if layer.format != "bf16")
    formats = " and ".join(name.upper() for name in names)
    counted = f"{quantized} in {formats}" if formats else f"{quantized} quantized"
    if quantized:
        return counted
    few = _too_few(recipe, tokens) if formats else None
    return f"{counted}: {few or why_nothing_quantized(recipe, tokens)}"


def why_nothing_quantized(recipe: Mapping[str, Any] | None, tokens: int) -> str:
    """Why no token of a prompt was quantized, as far as the recipe says.

    Args:
        recipe: with everything decided; None: not known.
        tokens: of the prompt that were read in one pass.
    """
    recipe = recipe or {}
    formats = recipe.get("format")
    if (set(formats.values()) if isinstance(formats, Mapping) else {formats}) == {"bf16"}:
        return "the recipe keeps every layer in BF16"
    if few := _too_few(recipe, tokens):
        return f"{tokens} tokens are {few}"
    return "no layer of this model can be quantized"


def _too_few(recipe: Mapping[str, Any], tokens: int) -> str | None:
    least = recipe.get("min_prefill_tokens") or 0
    if tokens < least:
        return f"fewer than {least}"
    precise = (recipe.get("precise_head") or 0) + (recipe.get("precise_tail") or 0)
    if tokens - precise < max(least, 1):
        return f"fewer than {max(least, 1)} besides the {precise} that stay in BF16"
    return None
