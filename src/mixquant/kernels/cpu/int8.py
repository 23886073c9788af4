"""What stands before an INT8 product on a CPU, in one loop with the quantization of its rows.

Each chain treats rows one by one: what comes out for a row does not depend on the others, nor on how
many they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.kernels.cpu.compiled import fused

QMAX = 127  # -128 is left out: codes are symmetric


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes plus 128 (UINT8 ``[M, K]``) and scales (FP32 ``[M, 1]``) of FP32 rows ``[M, K]``.

    oneDNN's fast path on VNNI takes unsigned activations, with a zero point that it compensates
    for. Added as a float, it keeps the conversion to bytes vectorized (3.5 times as fast as by way
    of INT32).
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    # Below this the reciprocal overflows; such a row holds nothing that BF16 could tell from zero.
    # Divided by a tensor: by a number, CUDA multiplies with its reciprocal, an ulp off the CPU.
    qmax = torch.full((), float(QMAX), dtype=torch.float32, device=x.device)
    scale = torch.where(largest < 1e-35, 1.0, largest / qmax)
    return (torch.round(x * (1.0 / scale)) + 128.0).to(torch.uint8), scale


@fused()
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`int8_codes` of rows ``[M, K]`` in BF16, FP16 or FP32."""
    return int8_codes(x.float())


@fused()
def rescale(product: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes ``product * row_scale + bias`` into ``out``, all ``[M, N]`` but ``row_scale [M, 1]``."""
    scaled = product * row_scale
    out.copy_(scaled if bias is None else scaled + bias)


@fused(few_rows=0, options={"emulate_precision_casts": True})
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of rows ``[M, K]`` (arXiv 1910.07467), in the type of ``x``, and its `int8_codes`.

    It is rounded where Transformers rounds it, so that it differs from the plain one by the order of
    the sum alone.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight * normed.to(x.dtype)).to(x.dtype)
    return (y, *int8_codes(y.float()))


@fused(few_rows=0)
def silu_mul_quantize(gate: Tensor, up: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`int8_codes` of ``silu(gate * row_scale) * (up * row_scale)``, all of it in FP32.

    Args:
        gate, up: products ``[M, F]`` before their row scale.
        row_scale: ``[M, 1]`` FP32.
    """
    g = gate.float() * row_scale
    return int8_codes(torch.nn.functional.silu(g) * (up.float() * row_scale))


@fused(few_rows=0)
def gelu_mul_quantize(gate: Tensor, up: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same with GELU in its tanh form."""
    g = torch.nn.functional.gelu(gate.float() * row_scale, approximate="tanh")
    return int8_codes(g * (up.float() * row_scale))
