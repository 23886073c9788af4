"""Makes the quantization method `mixquant` known to Transformers, which has no entry points.

`import mixquant` must be enough for `from_pretrained`, and must load neither Transformers nor our
engine for it: every vLLM worker imports this package, too. So Transformers is given stand-ins as soon
as its registry exists, and they load the engine when a model asks for the method.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mixquant._after_import import after_import

NAME = "mixquant"


def register() -> None:
    """Registers the method now if Transformers' registry is loaded, else as soon as it is."""
    after_import("transformers.quantizers.auto", _register)


def _register(auto: ModuleType) -> None:
    if NAME in auto.AUTO_QUANTIZER_MAPPING:
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

    auto.register_quantization_config(NAME)(Config)
    auto.register_quantizer(NAME)(Quantizer)
