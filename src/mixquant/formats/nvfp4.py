"""NVFP4: E2M1 codes, one E4M3 scale per 16 elements along K, one FP32 scale per tensor.

This is the format as layers use it: weights, rows and their product. `nvfp4_blocks` quantizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.formats.base import EMULATION, Kernel
from mixquant.formats.nvfp4_blocks import (
    BLOCK,
    ROW_GLOBAL_SCALE,
    BlockScale,
    check,
    dequantize,
    global_scale,
    in_parts,
    quantize,
    quantize_matrix,
    scale_rows,
    unscaled,
)
from mixquant.formats.swizzle import swizzle, unswizzle
from mixquant.hardware import cuda_capability, cuda_formats


@dataclass(frozen=True)
class NVFP4Weight:
    """A weight ``[N, K]`` in NVFP4."""

    codes: Tensor  # [N, K/2] uint8, packed
    block_scales: Tensor  # float8_e4m3fn; [N, K/16], or swizzled for a native kernel
    tensor_scale: Tensor  # [1] FP32
    unscaled: Tensor | None  # [N, K] BF16, codes times block scales, exact; for emulation only
    kernel: Kernel
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes held, with the BF16 matrix of the emulation."""
        held = (self.codes, self.block_scales, self.tensor_scale, self.unscaled)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def weight_of(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, kernel: Kernel
) -> NVFP4Weight:
    """A weight laid out for a kernel, out of what another quantizer made.

    Args:
        codes: ``[N, K/2]`` uint8, packed.
        block_scales: ``[N, K/16]`` float8_e4m3fn, linear.
        tensor_scale: ``[1]`` FP32.
    """
    return NVFP4Weight(
        codes=codes,
        block_scales=swizzle(block_scales) if kernel.native else block_scales,
        tensor_scale=tensor_scale.view(1),
        unscaled=None if kernel.native else unscaled(codes, block_scales),
        kernel=kernel,
        shape=(codes.shape[0], codes.shape[1] * 2),
    )


def emulated_weight(codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> NVFP4Weight:
    """`weight_of` for emulation."""
    return weight_of(codes, block_scales, tensor_scale, EMULATION)


@dataclass(frozen=True)
class NVFP4Rows:
    """Activation rows ``[M, K]`` in NVFP4."""

    codes: Tensor  # [M, K/2] uint8, packed
    block_scales: Tensor  # float8_e4m3fn; [M, K/16], or swizzled for a native kernel
    row_scale: Tensor  # [M, 1] FP32, powers of two; NaN for rows that hold inf or NaN
    kernel: Kernel


class _NVFP4:
    """The format ``nvfp4`` (see `mixquant.formats.base.Format`)."""

    name = "nvfp4"

    def why_not(self, out_features: int, in_features: int, kernel: Kernel) -> str | None:
        if in_features % BLOCK:
            return f"in_features {in_features} is not a multiple of {BLOCK}"
        # As scaled_mm counts bytes, its 16 along K are 32 codes.
        if kernel.native and in_features % 32:
            return f"{kernel.name} needs in_features a multiple of 32, not {in_features}"
        if kernel.native and out_features % 16:
            return f"{kernel.name} needs out_features a multiple of 16, not {out_features}"
        return None

    def kernel(self, device: torch.device) -> Kernel:
        return _kernel(device)

    def quantize_weight(
        self, weight: Tensor, kernel: Kernel, block_scale: BlockScale = "6"
    ) -> NVFP4Weight:
        """Quantizes a weight ``[N, K]`` (BF16, FP16 or FP32), laid out for `kernel`.

        The tensor scale comes from the largest magnitude. A weight with inf or NaN in it stands
        for NaN throughout.

        Raises:
            ValueError: no matrix, a shape that `why_not` refuses, another type, or an unknown
                `block_scale`.
        """
        weight = weight.detach()
        check(weight, block_scale, matrix=True)
        n, k = weight.shape
        if (reason := self.why_not(n, k, kernel)) is not None:
            raise ValueError(reason)
        scale = global_scale(weight.abs().amax().float(), block_scale)
        codes, scales = quantize(weight, scale, block_scale)
        return weight_of(codes, scales, scale.reciprocal(), kernel)

    def dequantize_weight(self, weight: NVFP4Weight) -> Tensor:
        n, k = weight.shape
        scales = _linear_scales(weight.block_scales, weight.kernel, n, k)
        return dequantize(weight.codes, scales, weight.tensor_scale)

    def quantize_rows(self, x: Tensor, kernel: Kernel, block_scale: BlockScale = "6") -> NVFP4Rows:
        """Quantizes rows ``[M, K]`` (BF16, FP16 or FP32), each by itself, for `kernel`.

        Raises:
            ValueError: no matrix, K is not a multiple of 16, another type, or an unknown
                `block_scale`.
        """
        x = x.detach()
        check(x, block_scale, matrix=True)
        global_scale = torch.full((), ROW_GLOBAL_SCALE, dtype=torch.float32, device=x.device)

        def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled, row_scale = scale_rows(x.float(), block_scale)
            return *quantize_matrix(scaled, global_scale, block_scale), row_scale

        codes, scales, row_scale = in_parts(quantize_rows, x)
        if kernel.native:
            scales = swizzle(scales)
        return NVFP4Rows(codes, scales, row_scale, kernel)

    def dequantize_rows(self, rows: NVFP4Rows) -> Tensor:
        """The FP32 matrix ``[M, K]`` that quantized rows stand for.

        Magnitudes within a sixteenth of FP32's largest may have been rounded to more than it
        holds, and come back as inf; `linear` applies the scales later and is spared that.
        """
        m, k = rows.codes.shape[0], rows.codes.shape[1] * 2
        scales = _linear_scales(rows.block_scales, rows.kernel, m, k)
        return dequantize(rows.codes, scales, rows.row_scale / ROW_GLOBAL_SCALE)

    def linear(
        self, rows: NVFP4Rows, weight: NVFP4Weight, bias: Tensor | None, out: Tensor
    ) -> None:
        """Writes ``rows @ weight.T + bias`` into `out`, ``[M, N]``, BF16, FP16 or FP32.

        Raises:
            ValueError: rows and weight are laid out for different kernels.
        """
        if rows.kernel != weight.kernel:
            raise ValueError(
                f"rows for {rows.kernel.name} cannot meet a weight for {weight.kernel.name}"
            )
        if out.numel() == 0:
            return
        if weight.kernel.native:
            product = F.scaled_mm(**_scaled_mm_arguments(rows, weight, out.dtype))
        else:
            assert weight.unscaled is not None
            product = _matmul_fp32(unscaled(rows.codes, rows.block_scales), weight.unscaled)
            product.mul_(weight.tensor_scale / ROW_GLOBAL_SCALE)
        if bias is None:
            torch.mul(product, rows.row_scale, out=out)
        else:
            torch.addcmul(bias, product, rows.row_scale, out=out)


NVFP4 = _NVFP4()


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    if (
        "nvfp4" in cuda_formats(cuda_capability(device))
        and hasattr(F, "scaled_mm")
        and hasattr(torch, "float4_e2m1fn_x2")
    ):
        return Kernel("torch.scaled_mm", native=True)
    return EMULATION


def _linear_scales(block_scales: Tensor, kernel: Kernel, m: int, k: int) -> Tensor:
    return unswizzle(block_scales, m, k // BLOCK) if kernel.native else block_scales


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of BF16 matrices, in FP32, neither the sums nor the result rounded to BF16."""
    if a.is_cuda and torch.version.cuda is not None:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()


def _scaled_mm_arguments(
    rows: NVFP4Rows, weight: NVFP4Weight, out_dtype: torch.dtype
) -> dict[str, Any]:
    """The keyword arguments of ``torch.nn.functional.scaled_mm`` for ``rows @ weight.T``."""
    return {
        "mat_a": rows.codes.view(torch.float4_e2m1fn_x2),  # [M, K/2]
        "mat_b": weight.codes.view(torch.float4_e2m1fn_x2).t(),  # [K/2, N], column-major
        "scale_a": [
            rows.block_scales,
            torch.full((1,), 1 / ROW_GLOBAL_SCALE, dtype=torch.float32, device=rows.codes.device),
        ],
        "scale_b": [weight.block_scales, weight.tensor_scale],
        "scale_recipe_a": [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise],
        "scale_recipe_b": [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise],
        "swizzle_a": [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE],
        "swizzle_b": [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE],
        # The row scales are still to come. As powers of two they commute with rounding to BF16,
        # which has FP32's range; FP16 has not.
        "output_dtype": torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32,
    }
