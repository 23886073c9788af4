"""The table in the log: what each linear layer of the loaded model became."""

from __future__ import annotations

import torch

from mixquant.core.layer_names import FUSED_PROJECTIONS
from mixquant.core.recipe import Recipe
from mixquant.core.summary import IGNORED, THE_RECIPE, Layer, Summary
from mixquant.engines.vllm.log import logger


def summary(model: torch.nn.Module, recipe: Recipe, patches: tuple[str, ...] = ()) -> Summary:
    """The layers of a loaded model, those that stay BF16 with the reason."""
    from vllm.model_executor.layers.linear import LinearBase

    from mixquant.engines.vllm import versions
    from mixquant.engines.vllm.linear.method import PhaseLinearMethod

    layers: list[Layer] = []
    experts = versions.moe_layer_classes()
    for path, module in model.named_modules():
        name = getattr(module, "mixquant_name", path)
        method = getattr(module, "quant_method", None)
        if isinstance(method, PhaseLinearMethod) or (
            isinstance(module, experts) and hasattr(method, "described")
        ):
            layers.extend(method.described(name))  # type: ignore[union-attr]
        elif isinstance(module, (LinearBase, *experts)):
            why = getattr(module, "mixquant_why_precise", "")
            layers.append(Layer(name, (0, 0), "bf16", "vLLM", True, 0, why))
    return Summary(recipe, tuple(layers), patches)


def names_of_linears(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names that a recipe's patterns may mean: of layers with a choice of format, and of others.

    Of a fused layer also those of its projections.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from mixquant.engines.vllm import versions

    free: list[str] = []
    others: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (LinearBase, ParallelLMHead, *versions.moe_layer_classes())):
            continue
        name = getattr(module, "mixquant_name", path)
        method = getattr(module, "quant_method", None)
        parent, _, last = name.rpartition(".")
        members = getattr(method, "members", None) or FUSED_PROJECTIONS.get(last, ())
        why = getattr(module, "mixquant_why_precise", None)
        chosen = why in (None, IGNORED, THE_RECIPE) and not isinstance(module, ParallelLMHead)
        names = [name, *(f"{parent}.{one}" if parent else one for one in members)]
        (free if chosen else others).extend(names)
    return free, others


def log_table(model: torch.nn.Module, recipe: Recipe, patches: tuple[str, ...]) -> None:
    """Writes the table, and what the recipe asks for in vain, into the log of the first worker."""
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.models.utils import PPMissingLayer

    if get_tensor_model_parallel_rank() != 0:
        return
    made = summary(model, recipe, patches)
    logger.info("mixquant\n%s", made)
    elsewhere = any(isinstance(module, PPMissingLayer) for module in model.modules())
    where = " (of the layers of this pipeline stage)" if elsewhere else ""
    sentences = [*recipe.patterns_without_effect(*names_of_linears(model)), made.why_nothing()]
    slow = sum(not layer.native and layer.format != "bf16" for layer in made.layers)
    if slow and not recipe.emulate:
        sentences.append(
            f"{slow} layers are emulated, slower than BF16, though the recipe does not ask for it; "
            "please report this with the table above"
        )
    for sentence in sentences:
        if sentence is not None:
            logger.warning("%s%s", sentence, where)
