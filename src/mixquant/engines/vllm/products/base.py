"""What a product of quantized rows with one quantized weight gives its callers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mixquant.engines.vllm import hardware
from mixquant.formats import Kernel
from mixquant.formats.nvfp4_blocks import BLOCK


class Product(Protocol):
    """A quantized weight ``[N, K]`` and what multiplies rows with it."""

    format: str
    kernel: Kernel
    nbytes: int

    def encode(self, rows: Tensor) -> Any:
        """Rows ``[M, K]`` as `multiply` takes them, the same for all products of a format here."""
        ...

    def multiply(self, encoded: Any, bias: Tensor | None, out: Tensor) -> None:
        """Writes the products ``[M, N]`` of encoded rows into ``out``.

        ``out`` may be columns of a wider matrix; ``bias`` is ``[N]`` in its type, or None.
        """
        ...

    def __call__(self, rows: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes the products ``[M, N]`` of rows ``[M, K]`` into ``out``, as `multiply` does."""
        self.multiply(self.encode(rows), bias, out)


def unsupported_shape(fmt: str, out_features: int, in_features: int) -> str | None:
    """Why this machine's kernel cannot hold a weight of this shape, or None if it can."""
    if fmt == "nvfp4" and in_features % BLOCK:
        return f"in_features {in_features} is not a multiple of {BLOCK}"
    if hardware.multiplies_by_cutlass(fmt) and (out_features % 16 or in_features % 16):
        return f"{out_features} x {in_features}: CUTLASS needs multiples of 16"
    return None


def nbytes_of(fmt: str, out_features: int, in_features: int) -> int:
    """How many bytes the copy of a weight takes in a native kernel."""
    elements = out_features * in_features
    if fmt == "nvfp4":
        return elements // 2 + elements // BLOCK
    return elements + 4 * out_features
