"""Makes what mixquant adds to Transformers known to it, which has no entry points.

That is the quantization method `mixquant` and the attention implementation `mixquant_sdpa`.

`import mixquant` must be enough for `from_pretrained`, and must load neither Transformers nor our
engine for it: every vLLM worker imports this package, too. So Transformers is given stand-ins as soon
as its registries exist, and they load the engine when a model asks for one of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mixquant._after_import import after_import

QUANTIZER = "mixquant"
ATTENTION_IMPLEMENTATION = "mixquant_sdpa"


def register() -> None:
    """Registers both now if Transformers' registries are loaded, else as soon as they are."""
    after_import("transformers.quantizers.auto", _register)
    after_import("transformers.modeling_utils", _register_attention)


def _register(auto: ModuleType) -> None:
    if QUANTIZER in auto.AUTO_QUANTIZER_MAPPING:
        return

    class Config(auto.QuantizationConfigMixin):  # type: ignore[misc, name-defined]
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            from mixquant.engines.transformers.quantizer import MixQuantConfig

            return MixQuantConfig.from_dict(*args, **kwargs)

    class Quantizer(auto.HfQuantizer):  # type: ignore[misc, name-defined]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from mixquant.engines.transformers.quantizer import MixQuantHfQuantizer

            return MixQuantHfQuantizer(*args, **kwargs)

    auto.register_quantization_config(QUANTIZER)(Config)
    auto.register_quantizer(QUANTIZER)(Quantizer)


def _register_attention(modeling: ModuleType) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attend(*args: Any, **kwargs: Any) -> Any:
        from mixquant.engines.transformers import decode_attention

        return decode_attention.attend(*args, **kwargs)

    modeling.ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        ATTENTION_IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
