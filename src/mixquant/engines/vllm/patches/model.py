"""What is changed in a loaded model, before its first pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixquant.core.recipe import Recipe
from mixquant.engines.vllm.attention.layers import PrefillAttention
from mixquant.engines.vllm.linear import fp8_layer
from mixquant.engines.vllm.patches.attention import patch_attention
from mixquant.engines.vllm.patches.loading import patch_load_weights
from mixquant.engines.vllm.patches.norms_and_activations import fuse_activations, fuse_norms
from mixquant.engines.vllm.patches.outcome import Outcome


@dataclass(frozen=True)
class Patched:
    """What became of a model's patches, and the largest of its layers that attend in FP8."""

    outcomes: tuple[Outcome, ...]
    fp8_attention: PrefillAttention | None


def patch_model(model: torch.nn.Module, recipe: Recipe, vllm_config: Any) -> Patched:
    """Patches a loaded model, and has the kernels compiled that its layers will launch."""
    with_lora = vllm_config.lora_config is not None
    ranks = vllm_config.parallel_config.tensor_parallel_size
    attention, largest = patch_attention(model, recipe)
    outcomes = [attention]
    if torch.cuda.is_available():
        outcomes += [fuse_activations(model, with_lora), fuse_norms(model, with_lora, ranks)]
        device = torch.device("cuda")
        if largest is not None:
            largest.warm_up(device)
        methods = [getattr(module, "mixquant_method", None) for module in model.modules()]
        layers = [getattr(method, "fp8", None) for method in methods]
        fp8_layer.warm_up([layer for layer in layers if layer is not None], device)
    patch_load_weights(model)
    return Patched(tuple(outcomes), largest)
