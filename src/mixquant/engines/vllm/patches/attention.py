"""Attention layers of a loaded model: which ones attend in FP8, and why the others do not."""

from __future__ import annotations

from typing import Any

import torch

from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import hardware, versions
from mixquant.engines.vllm.attention.fp8 import HEAD_SIZES
from mixquant.engines.vllm.attention.layers import PrefillAttention
from mixquant.engines.vllm.patches.outcome import Outcome


def why_bf16(layer: Any, implementation: Any, dtype: torch.dtype | None) -> str | None:
    """Why a layer's attention stays BF16, or None if it need not."""
    if (why := hardware.why_no_fp8_attention()) is not None:
        return why
    # Others may see parts of a sequence, or more than itself: chunks, prefixes, another's keys.
    if type(layer) is not versions.attention_layer_class():
        return f"not for vLLM's {type(layer).__name__}"
    if type(implementation).__name__ != "FlashAttentionImpl":
        return f"not for vLLM's {type(implementation).__name__}"
    if getattr(implementation, "attn_type", "decoder") != "decoder":
        return "not a decoder's attention"
    if dtype != torch.bfloat16 or implementation.kv_cache_dtype not in ("auto", "bfloat16"):
        return "needs queries and a KV cache in BF16"
    if implementation.head_size not in HEAD_SIZES:
        return f"head size {implementation.head_size}; expected one of {HEAD_SIZES}"
    if tuple(implementation.sliding_window) != (-1, -1):
        return "sliding window"
    if implementation.alibi_slopes is not None or implementation.logits_soft_cap:
        return "ALiBi or capped logits"
    # Such a layer is given keys of its own all the same, and does not attend to them.
    if getattr(implementation, "kv_sharing_target_layer_name", None) is not None:
        return "attends to another layer's keys"
    if getattr(implementation, "sinks", None) is not None:
        return "attention sinks"
    if getattr(implementation, "dcp_world_size", 1) > 1:
        return "decode context parallelism"
    return None


def patch_attention(
    model: torch.nn.Module, recipe: Recipe
) -> tuple[Outcome, PrefillAttention | None]:
    """Makes a loaded model's attention layers multiply quantized rows in FP8, where they can.

    Returns:
        What was done, and of the layers that were changed the one that needs the most workspace.
    """
    what = "attention in FP8:"
    assert isinstance(recipe.format, dict)
    quantizes = set(recipe.format.values()) != {"bf16"}
    asked = recipe.prefill_attention
    if asked in ("bf16", "int8") or (asked == "auto" and not quantizes):
        return Outcome(what, ()), None
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    patched: list[PrefillAttention] = []
    reasons: list[str | None] = []
    for layer in model.modules():
        if not isinstance(layer, AttentionLayerBase):
            continue
        implementation: Any = getattr(layer, "impl", None)
        why = why_bf16(layer, implementation, getattr(layer, "dtype", None))
        reasons.append(why)
        if why is None:
            if not isinstance(implementation.forward, PrefillAttention):
                always = recipe.prefill_attention == "fp8"
                implementation.forward = PrefillAttention(
                    implementation.forward, implementation, always
                )
            patched.append(implementation.forward)
    largest = max(patched, key=lambda one: one.shape.heads * one.shape.size, default=None)
    return Outcome(what, tuple(reasons)), largest
