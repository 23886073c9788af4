"""The table in the log: what each linear layer of the loaded model became."""

from __future__ import annotations

import torch

from mixquant.engines.vllm.log import logger
from mixquant.recipe import Recipe
from mixquant.summary import Layer, Summary


def summary(model: torch.nn.Module, recipe: Recipe, attention: str = "") -> Summary:
    """The layers of a loaded model, those that stay BF16 with the reason."""
    from vllm.model_executor.layers.linear import LinearBase

    from mixquant.engines.vllm import versions
    from mixquant.engines.vllm.linear import PhaseLinearMethod

    layers: list[Layer] = []
    experts = versions.moe_layer_classes()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, PhaseLinearMethod) or (
            isinstance(module, experts) and hasattr(method, "described")
        ):
            layers.extend(method.described(name))  # type: ignore[union-attr]
        elif isinstance(module, (LinearBase, *experts)):
            why = getattr(module, "mixquant_why_precise", "")
            layers.append(Layer(name, (0, 0), "bf16", "vLLM", True, 0, why))
    return Summary(recipe, tuple(layers), attention)


def log_table(model: torch.nn.Module, recipe: Recipe, attention: str) -> None:
    """Writes the table into the log of the engine's first worker."""
    from vllm.distributed import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() == 0:
        logger.info("mixquant\n%s", summary(model, recipe, attention))
