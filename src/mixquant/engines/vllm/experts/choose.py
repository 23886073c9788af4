"""Which method a layer of experts gets: vLLM's own, or one that chooses for each row."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.recipe import Recipe, most_precise
from mixquant.core.summary import IGNORED, THE_RECIPE
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.experts import fp8 as fp8_experts
from mixquant.engines.vllm.experts.method import PhaseExpertsMethod
from mixquant.engines.vllm.loading.memory import Ledger


def experts_method(
    layer: RoutedExperts, recipe: Recipe, prefix: str, ledger: Ledger
) -> PhaseExpertsMethod | None:
    """The method for a layer of experts, or None for vLLM's own, in BF16.

    Where it is None, ``layer.mixquant_why_precise`` says why.
    """
    fmt, why, stored = _format_of(layer, recipe, prefix)
    if why is None:
        why = unsupported(layer, fmt)
    if why is not None:
        layer.mixquant_why_precise = why
        return None
    return PhaseExpertsMethod(
        layer.moe_config,
        fmt,
        prefix,
        ledger,
        recipe.block_scale,
        only_quantized=recipe.role == "prefill",
        prefill_model=recipe.prefill_model if stored else None,
    )


def unsupported(layer: RoutedExperts, fmt: str) -> str | None:
    """Why these experts cannot be multiplied in this format, each row by itself; None if they can."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    if not hardware.is_gpu():
        return "vLLM's CPU experts are compiled into the graph, where no row can be told apart"
    if parallel.dp_size > 1:
        return "data parallel: rows of other ranks arrive, each with a plan of its own"
    if parallel.pcp_size > 1 or parallel.is_sequence_parallel:
        return "each rank has a piece of the rows"
    if parallel.use_ep or parallel.enable_eplb:
        return "expert parallel"
    if moe.is_lora_enabled:
        return "LoRA replaces the method of the experts"
    if moe.has_bias:
        return "biases"
    if type(layer) is not RoutedExperts:
        return f"{type(layer).__name__}, experts of the model's own"
    if layer.params_dtype != torch.bfloat16:
        return f"weights in {layer.params_dtype}"
    if fmt == "fp8":
        if fp8_experts.kernel_class(moe) is None:
            return "vLLM has no FP8 experts for this GPU and activation"
        return None
    if fmt == "nvfp4":
        from mixquant.engines.vllm.experts.nvfp4 import Nvfp4Experts

        return Nvfp4Experts.unsupported(layer)
    return f"no experts in {fmt}"


def _format_of(layer: RoutedExperts, recipe: Recipe, prefix: str) -> tuple[str, str | None, bool]:
    """The experts' format, why it is BF16, and whether the prefill model has them in that format."""
    if recipe.ignores(prefix):
        return "bf16", IGNORED, False
    fmt = recipe.format_of(prefix)
    found = None
    if recipe.prefill_model is not None:
        moe = layer.moe_config
        if not moe.is_act_and_mul:
            return "bf16", "experts without a gate are not taken from a prefill model", False
        found, why = opened(recipe.prefill_model).format_of_experts(prefix, moe.num_experts)
        if found is None:
            return "bf16", why, False
        fmt = most_precise((fmt, found))
    return fmt, THE_RECIPE if fmt == "bf16" else None, fmt == found
