"""Products that torch computes: the BF16 part of a layer, and formats that are emulated here."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mixquant.engines.vllm.products.base import Product
from mixquant.formats import BY_NAME, EMULATION, Kernel


class PreciseProduct(Product):
    """The part of a layer that stays BF16 where the rest of its weight is given back."""

    format = "bf16"
    kernel = Kernel("torch", native=True)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.clone()
        self.nbytes = self.weight.nbytes

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def multiply(self, encoded: Tensor, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(F.linear(encoded, self.weight, bias))


class EmulatedProduct(Product):
    """A format that this machine does not multiply natively, in this project's own emulation."""

    kernel = EMULATION

    def __init__(self, fmt: str, weight: Tensor, options: dict[str, Any]) -> None:
        self._set_weight(fmt, BY_NAME[fmt].quantize_weight(weight, EMULATION, **options), options)

    @classmethod
    def of_weight(cls, fmt: str, weight: Any, options: dict[str, Any]) -> EmulatedProduct:
        """From a weight that is quantized already, in this project's own representation."""
        self = cls.__new__(cls)
        self._set_weight(fmt, weight, options)
        return self

    def _set_weight(self, fmt: str, weight: Any, options: dict[str, Any]) -> None:
        self.format = fmt
        self.weight = weight
        self.options = options
        self.nbytes = weight.nbytes

    def encode(self, rows: Tensor) -> Any:
        return BY_NAME[self.format].quantize_rows(rows, EMULATION, **self.options)

    def multiply(self, encoded: Any, bias: Tensor | None, out: Tensor) -> None:
        BY_NAME[self.format].linear(encoded, self.weight, bias, out)
