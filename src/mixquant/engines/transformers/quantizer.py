"""Mixquant as a Transformers quantization method: `from_pretrained` and `save_pretrained`.

The checkpoint stays a BF16 one; its config.json carries the recipe besides. Transformers looks the
method up by name, so `mixquant` must have been imported when such a checkpoint is loaded (see
`mixquant._registration`). Without it Transformers warns of an unknown quantization type and loads the
plain BF16 model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixquant.core.recipe import Recipe
from mixquant.engines.transformers.convert import as_recipe, convert

QUANT_METHOD = "mixquant"


class MixQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`from_pretrained(..., quantization_config=MixQuantConfig("fast"))`.

    Args:
        recipe: a `Recipe`, its fields as a dict, or what `Recipe.load` takes. Keyword arguments
            are fields of the recipe and come on top.

    Raises:
        RecipeError: an invalid recipe.
    """

    def __init__(self, recipe: Recipe | dict[str, Any] | str = "balanced", **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        fields.pop("quant_method", None)
        self.recipe = Recipe.from_dict({**as_recipe(recipe).to_dict(), **fields})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, "recipe": self.recipe.to_dict()}


class MixQuantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Prepares the model once Transformers has loaded its weights."""

    requires_calibration = False
    quantization_config: MixQuantConfig

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        convert(model, self.quantization_config.recipe)
        attach(model, self.quantization_config.recipe)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False  # a compiled forward pass would keep the plan it was traced with


def attach(model: PreTrainedModel, recipe: Recipe) -> None:
    """Makes Transformers see a prepared model as quantized, so that it is saved with its recipe."""
    config = MixQuantConfig(recipe)
    model.config.quantization_config = config
    model.hf_quantizer = MixQuantHfQuantizer(config, pre_quantized=False)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
