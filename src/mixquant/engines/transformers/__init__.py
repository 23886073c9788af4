"""The Transformers engine: embedded, in process."""

from mixquant.core.summary import Layer, Summary
from mixquant.engines.transformers.description import summary
from mixquant.engines.transformers.module import PrepareError
from mixquant.engines.transformers.passes import everything_in_prefill_format, phase
from mixquant.engines.transformers.prepare import prepare, requantize
from mixquant.engines.transformers.quantizer import MixQuantConfig

__all__ = [
    "Layer",
    "MixQuantConfig",
    "PrepareError",
    "Summary",
    "everything_in_prefill_format",
    "phase",
    "prepare",
    "requantize",
    "summary",
]
