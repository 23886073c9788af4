"""Number formats, one module each, and what a device multiplies natively."""

from __future__ import annotations

import torch

from mixquant.formats.base import EMULATION, Format, Kernel, QuantizedWeight
from mixquant.formats.fp8 import FP8
from mixquant.formats.int8 import INT8
from mixquant.formats.nvfp4 import NVFP4

BY_NAME: dict[str, Format] = {"nvfp4": NVFP4, "fp8": FP8, "int8": INT8}


def native_formats(device: torch.device) -> frozenset[str]:
    """The names of the formats that this device multiplies natively."""
    return frozenset(name for name, fmt in BY_NAME.items() if fmt.kernel(device).native)


__all__ = ["BY_NAME", "EMULATION", "Format", "Kernel", "QuantizedWeight", "native_formats"]
