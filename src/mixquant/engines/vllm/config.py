"""The quantization method as vLLM sees it: which layers it takes, and with which recipe."""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from mixquant.core.layer_names import is_drafter, is_router, is_tower
from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import versions
from mixquant.engines.vllm.loading.memory import Ledger
from mixquant.engines.vllm.log import refusals

QUANTIZATION_METHOD = "mixquant"


class PhaseQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization="mixquant"`: BF16 weights, and for prefill a quantized copy of them.

    vLLM makes one per engine, in the process that was asked for it, and sends it to the workers.
    `recipe` is put in by `mixquant.engines.vllm.settings` before anything is loaded.
    """

    def __init__(self, recipe_in_checkpoint: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.recipe_in_checkpoint = recipe_in_checkpoint
        self.recipe: Recipe | None = None
        self.counters: str | None = None
        self.default_graph_sizes = False  # whether vLLM chose which CUDA graphs are captured
        self.default_threshold = False  # whether the recipe leaves min_prefill_tokens to mixquant
        self.layers: int | None = None  # of the model itself, where there is a drafter besides
        self.ledger = Ledger()

    def get_name(self) -> Any:
        return QUANTIZATION_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PhaseQuantizationConfig:
        """From the config.json that `save_pretrained` of a prepared model wrote."""
        return cls(config.get("recipe"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> None:
        # vLLM's own refusal would only say that two names differ.
        found = (hf_quant_cfg or {}).get("quant_method")
        if user_quant == QUANTIZATION_METHOD and found not in (None, "", QUANTIZATION_METHOD):
            with refusals():
                raise ValueError(
                    f"the checkpoint is quantized already ({found}); mixquant needs the BF16 one, "
                    "and takes a quantized one as the recipe's prefill_model"
                )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from mixquant.engines.vllm.linear.method import PhaseLinearMethod
        from mixquant.engines.vllm.patches import runners

        why = self.why_precise(prefix)
        if self.recipe is None:  # vLLM makes some drafters a configuration of their own
            assert why is not None, "mixquant's settings were not installed"
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        runners.install(self)
        # By this name recipes know it. vLLM's own may be another: experts lie in `routed_experts`.
        layer.mixquant_name = prefix  # type: ignore[assignment]
        if isinstance(layer, LinearBase):
            if why is not None:
                layer.mixquant_why_precise = why  # type: ignore[assignment]
                return UnquantizedLinearMethod()
            return PhaseLinearMethod(self.recipe, prefix, self.packed_modules_mapping, self.ledger)
        if isinstance(layer, versions.moe_layer_classes()):
            if why is not None:
                layer.mixquant_why_precise = why  # type: ignore[assignment]
                return None
            from mixquant.engines.vllm.experts.choose import experts_method

            return experts_method(layer, self.recipe, prefix, self.ledger)
        return None

    def why_precise(self, prefix: str) -> str | None:
        """Why the layer of this name is left as it is, or None if it is not."""
        if is_tower(prefix):
            return "its rows are not tokens"
        if is_drafter(prefix, self.layers) or _builds_a_drafter():
            return "it drafts"
        if is_router(prefix):
            return "an expert router"
        return None


def _builds_a_drafter() -> bool:
    """Whether the model that vLLM is building drafts for another, whose layers' names it may have.

    Both are built with one configuration. What tells them apart is the tag under which vLLM compiles
    them: its models' own are ``backbone``, or ``self_decoder`` and ``cross_decoder``.
    """
    backends = sys.modules.get("vllm.compilation.backends")
    tag = str(getattr(backends, "model_tag", "backbone"))
    return tag.endswith("_head") or tag in ("draft_model", "extract_hidden_states")
