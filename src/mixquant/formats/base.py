"""What every number format gives its callers: quantize, dequantize, and a linear product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """How the products of one format run on one device.

    ``name`` says which library multiplies. ``native`` is True where the hardware multiplies the
    format itself, False where the operands are dequantized and multiplied in a wider type
    ("emulation": the same numbers, no gain in speed).
    """

    name: str
    native: bool


EMULATION = Kernel("emulation", native=False)


class QuantizedWeight(Protocol):
    """A weight matrix in a format, laid out for one kernel."""

    @property
    def kernel(self) -> Kernel: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features N, in_features K)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales, and by any packed copy that the kernel needs."""
        ...


class Format(Protocol):
    """A number format. One module of this package holds one, as a stateless singleton.

    The quantizers may take options of their own after the kernel (NVFP4: ``block_scale``).
    Rows are quantized one by one: what a row's codes and scales are never depends on the other
    rows of its batch.
    """

    @property
    def name(self) -> str: ...

    def why_not(self, out_features: int, in_features: int, kernel: Kernel) -> str | None:
        """Why a weight of this shape cannot be held or multiplied, or None if it can."""
        ...

    def kernel(self, device: torch.device) -> Kernel:
        """The kernel that this process uses on this device; chosen once, then remembered."""
        ...

    def quantize_weight(self, weight: Tensor, kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
        """Quantizes a weight ``[N, K]`` (BF16, FP16 or FP32), laid out for ``kernel``."""
        ...

    def dequantize_weight(self, weight: Any) -> Tensor:
        """The FP32 matrix ``[N, K]`` that a quantized weight stands for."""
        ...

    def quantize_rows(self, x: Tensor, kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
        """Quantizes activation rows ``[M, K]``, each by itself."""
        ...

    def linear(self, rows: Any, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """Writes ``rows @ weight.T + bias`` (``[M, N]``) into ``out``, in the type of ``out``."""
        ...
