"""Phase-aware quantized inference for LLM agents: low-precision prefill, BF16 decode.

model = mixquant.prepare(model)              # a loaded Transformers model, in place
print(mixquant.summary(model))               # layers, formats, kernels, extra memory
model.generate(**inputs)                     # applies the rule by itself
"""

# Importing the engine registers the quantization method with Transformers, which has no entry
# points: `import mixquant` must be enough for from_pretrained to know it.
from mixquant._version import __version__
from mixquant.core.recipe import Recipe, RecipeError
from mixquant.engines.transformers import (
    MixQuantConfig,
    PrepareError,
    Summary,
    phase,
    prepare,
    requantize,
    summary,
)

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
