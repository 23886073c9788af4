"""Phase-aware quantized inference for LLM agents: low-precision prefill, BF16 decode.

model = mixquant.prepare(model)              # a loaded Transformers model, in place
print(mixquant.summary(model))               # layers, formats, kernels, extra memory
model.generate(**inputs)                     # applies the rule by itself
"""

from typing import TYPE_CHECKING

from mixquant._registration import register as _register
from mixquant._version import __version__

if TYPE_CHECKING:
    from mixquant.core.recipe import Recipe, RecipeError
    from mixquant.core.summary import Summary
    from mixquant.engines.transformers import (
        MixQuantConfig,
        PrepareError,
        phase,
        prepare,
        requantize,
        summary,
    )
else:
    # Hidden from type checkers, for which a module with a `__getattr__` has every name there is.
    _HOMES = {
        "Recipe": "mixquant.core.recipe",
        "RecipeError": "mixquant.core.recipe",
        "Summary": "mixquant.core.summary",
    }

    def __getattr__(name: str) -> object:
        """Imports an exported name on its first use: most of them need Transformers."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(_HOMES.get(name, "mixquant.engines.transformers")), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "MixQuantConfig",
    "PrepareError",
    "Recipe",
    "RecipeError",
    "Summary",
    "__version__",
    "phase",
    "prepare",
    "requantize",
    "summary",
]

_register()
