"""FP8: E4M3 codes, one FP32 scale per activation row and per output channel.

From compute capability 8.9 (Ada, Hopper, Blackwell) the products run in torch's row-wise
``scaled_mm``; elsewhere they are emulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from mixquant.formats.base import EMULATION, Kernel
from mixquant.hardware import cuda_capability, cuda_formats

E4M3_MAX = 448.0
# The smallest scale: the E4M3 codes of smaller rows would need scales that FP32 holds badly. It is
# vLLM's bound for dynamic per-token scales.
MIN_SCALE = 1.0 / (E4M3_MAX * 512.0)

SCALED_MM = Kernel("torch.scaled_mm", native=True)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row of a matrix by itself, its largest magnitude to 448.

    Args:
        x: ``[M, K]``, BF16, FP16 or FP32.

    Returns:
        Codes ``[M, K]`` float8_e4m3fn, rounded half to even, and scales ``[M, 1]`` FP32.
    """
    values = x.float()
    # Divided by a tensor: by a number, CUDA multiplies with its reciprocal, an ulp off the CPU.
    largest_code = torch.full((), E4M3_MAX, dtype=torch.float32, device=x.device)
    scale = (values.abs().amax(dim=1, keepdim=True) / largest_code).clamp_min(MIN_SCALE)
    return (values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The FP32 matrix ``[M, K]`` that codes ``[M, K]`` and scales ``[M, 1]`` stand for."""
    return codes.float() * scale


@dataclass(frozen=True)
class Fp8Rows:
    """Activation rows ``[M, K]``: E4M3 codes and FP32 scales ``[M, 1]``."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """A weight ``[N, K]``: E4M3 codes and FP32 scales ``[N, 1]``."""

    codes: Tensor
    scale: Tensor
    kernel: Kernel
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


class _Fp8:
    name = "fp8"

    def why_not(self, out_features: int, in_features: int, kernel: Kernel) -> str | None:
        if kernel == SCALED_MM and (out_features % 16 or in_features % 16):
            return f"{out_features} x {in_features}: {kernel.name} needs multiples of 16"
        return None

    def kernel(self, device: torch.device) -> Kernel:
        return SCALED_MM if "fp8" in cuda_formats(cuda_capability(device)) else EMULATION

    def quantize_weight(self, weight: Tensor, kernel: Kernel) -> Fp8Weight:
        codes, scale = quantize(weight)
        return Fp8Weight(codes, scale, kernel, (weight.shape[0], weight.shape[1]))

    def dequantize_weight(self, weight: Fp8Weight) -> Tensor:
        return dequantize(weight.codes, weight.scale)

    def quantize_rows(self, x: Tensor, kernel: Kernel) -> Fp8Rows:
        return Fp8Rows(*quantize(x))

    def linear(self, rows: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, out: Tensor) -> None:
        if weight.kernel == SCALED_MM:
            product = scaled_mm(
                rows.codes,
                weight.codes.T,
                rows.scale,
                ScalingType.RowWise,
                weight.scale.T,
                ScalingType.RowWise,
                output_dtype=torch.bfloat16,  # the only one that row-wise scales come with
            )
        else:
            product = rows.codes.float() @ weight.codes.float().T
            product *= weight.scale.T
            product *= rows.scale
        out.copy_(product if bias is None else product + bias)


FP8 = _Fp8()
