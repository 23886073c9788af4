"""INT8: symmetric, one FP32 scale per activation row and per output channel.

On a CPU the products run in oneDNN, on VNNI or AMX; on an NVIDIA GPU in ``torch._int_mm``. Either
accumulates in INT32, so a row's products are exactly those it would have alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixquant.formats.base import EMULATION, Kernel
from mixquant.hardware import cuda_capability, cuda_formats
from mixquant.kernels.cpu import int8 as int8_cpu
from mixquant.kernels.cpu.int8 import QMAX

ONEDNN = Kernel("oneDNN", native=True)
INT_MM = Kernel("torch._int_mm", native=True)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row of a matrix by itself.

    The scale is the row's largest magnitude over 127 (1 for a row of zeros), the codes are rounded
    half to even.

    Args:
        x: ``[M, K]``, BF16, FP16 or FP32.

    Returns:
        Codes ``[M, K]`` INT8 and scales ``[M, 1]`` FP32.
    """
    unsigned, scale = int8_cpu.quantize(x)
    return (unsigned.to(torch.int16) - 128).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The FP32 matrix ``[M, K]`` that codes ``[M, K]`` and scales ``[M, 1]`` stand for."""
    return codes.float() * scale


@dataclass(frozen=True)
class Int8Rows:
    """Activation rows ``[M, K]``: codes plus 128 (UINT8) and FP32 scales ``[M, 1]``."""

    codes_plus_128: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int8Weight:
    """A weight ``[N, K]``: INT8 codes as the kernel wants them, FP32 scales ``[N]``."""

    codes: Tensor
    scale: Tensor
    kernel: Kernel
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        # The packed copy is larger than its codes: blocks are padded, and there is one INT32 per
        # channel to make up for the zero point.
        packed = self.codes.is_mkldnn
        codes = torch.ops.mkldnn._nbytes(self.codes) if packed else self.codes.nbytes
        return int(codes) + self.scale.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        return self  # immutable, and oneDNN's packed tensors cannot be copied


class _Int8:
    name = "int8"

    def why_not(self, out_features: int, in_features: int, kernel: Kernel) -> str | None:
        if kernel == INT_MM and (out_features % 8 or in_features % 8):
            return f"{out_features} x {in_features}: {kernel.name} needs multiples of 8"
        return None

    def kernel(self, device: torch.device) -> Kernel:
        if device.type == "cpu" and _onednn_multiplies():
            return ONEDNN
        return INT_MM if "int8" in cuda_formats(cuda_capability(device)) else EMULATION

    def quantize_weight(self, weight: Tensor, kernel: Kernel) -> Int8Weight:
        codes, scale = quantize(weight)
        if kernel == ONEDNN:
            codes = torch.ops.onednn.qlinear_prepack(codes, None)
        shape = (weight.shape[0], weight.shape[1])
        return Int8Weight(codes, scale.squeeze(1), kernel, shape)

    def dequantize_weight(self, weight: Int8Weight) -> Tensor:
        if weight.kernel != ONEDNN:
            return dequantize(weight.codes, weight.scale[:, None])
        # A packed weight is opaque: read it back as its product with the identity.
        unit = torch.eye(weight.shape[1], dtype=torch.float32).to(torch.uint8) + 128
        columns = onednn_product(unit, weight, torch.float32)  # [K, N]
        return columns.T.contiguous()

    def quantize_rows(self, x: Tensor, kernel: Kernel) -> Int8Rows:
        return Int8Rows(*int8_cpu.quantize(x))

    def linear(self, rows: Int8Rows, weight: Int8Weight, bias: Tensor | None, out: Tensor) -> None:
        if weight.kernel == ONEDNN:
            # Straight to BF16 where that is wanted: the FP32 product would be twice the memory to write
            # and read again. The second rounding, after the row scale, is far below INT8's own error.
            wide = torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32
            product = onednn_product(rows.codes_plus_128, weight, wide)
        else:
            codes = (rows.codes_plus_128.to(torch.int16) - 128).to(torch.int8)
            multiply = _int_mm if weight.kernel == INT_MM else _exact_product
            product = multiply(codes, weight.codes).float() * weight.scale
        int8_cpu.rescale(product, rows.scale, bias, out)


INT8 = _Int8()


def onednn_product(codes_plus_128: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The product of rows ``[M, K]`` (codes plus 128) with a weight packed for oneDNN.

    Returns:
        ``[M, N]`` in ``dtype``, the weight's scales applied, the rows' not.
    """
    zero_points = torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes_plus_128,
        1.0,  # the row scales come afterwards: oneDNN takes one scale for all rows
        128,
        weight.codes,
        weight.scale,
        zero_points.expand(weight.shape[0]),
        None,
        1.0,
        0,
        dtype,
        "none",
        [],
        "",
    )


def _int_mm(codes: Tensor, weight_codes: Tensor) -> Tensor:
    rows = codes.shape[0]
    if rows <= 16:  # cuBLAS refuses fewer
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 32 - rows))
    return torch._int_mm(codes, weight_codes.T)[:rows]


# So many products of codes have a sum that FP32 holds exactly, in whatever order they are added.
_EXACT_IN_FP32 = 2**24 // QMAX**2


def _exact_product(codes: Tensor, weight_codes: Tensor) -> Tensor:
    if codes.is_cuda:  # where FP32 may mean TF32, and FP64 is exact as far as 2^53
        return codes.double() @ weight_codes.double().T
    # On a CPU FP32 is twice as fast as FP64, which other devices may not have.
    pieces = [one.split(_EXACT_IN_FP32, dim=1) for one in (codes, weight_codes)]
    products = (rows.float() @ weights.float().T for rows, weights in zip(*pieces, strict=True))
    total = next(products)
    for product in products:
        total = total.to(torch.int32) + product.to(torch.int32)
    return total


@functools.cache
def _onednn_multiplies() -> bool:
    """Whether oneDNN's INT8 products are there, fast (VNNI or AMX) and right on this processor.

    Without VNNI oneDNN adds pairs of products in INT16, which saturates; hence the second check.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    codes = torch.full((32, 64), QMAX, dtype=torch.int8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        weight = Int8Weight(packed, torch.ones(32, dtype=torch.float32), ONEDNN, (32, 64))
        unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
        product = onednn_product(unsigned, weight, torch.float32)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((product == QMAX * QMAX * 64).all())
