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


def why_not_on(name: str, device: torch.device) -> str | None:
    """Why a device does not compute a format as a CPU does, or None if it does: by trying.

    Emulation is plain PyTorch, but not every device has every type and operator of it (MPS has no E4M3).
    """
    fmt = BY_NAME[name]
    wave = torch.linspace(-3, 2, 32 * 64, dtype=torch.float32).view(32, 64).sin()
    x, weight = wave, wave * 0.1
    outs = []
    for where in (torch.device("cpu"), device):
        kernel = EMULATION if where.type == "cpu" else fmt.kernel(where)
        out = torch.empty(32, 32, dtype=torch.float32, device=where)
        try:
            rows = fmt.quantize_rows(x.to(where), kernel)
            fmt.linear(rows, fmt.quantize_weight(weight.to(where), kernel), None, out)
            outs.append(out.cpu())
        except Exception as error:
            return (str(error) or type(error).__name__).strip().splitlines()[0]
    right = torch.allclose(outs[0], outs[1], rtol=0.01, atol=0.01)
    return None if right else "its products are wrong"


__all__ = [
    "BY_NAME",
    "EMULATION",
    "Format",
    "Kernel",
    "QuantizedWeight",
    "native_formats",
    "why_not_on",
]
