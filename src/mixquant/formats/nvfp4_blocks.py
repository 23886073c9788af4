"""Quantizes blocks of 16 elements to NVFP4, and back, whatever kernel multiplies them.

An element is ``code * block_scale * tensor_scale``. Quantization follows vLLM's reference
(``ref_nvfp4_quant`` in ``nvfp4_emulation_utils.py``) bit by bit, and takes what that calls the
global scale: the factor that carries a tensor into the range of codes and block scales. The tensor
scale, which carries it back, is its reciprocal.

With ``block_scale="4/6"`` each block takes the better of two scales (Four Over Six,
arXiv 2512.02010): its largest value becomes 6, the largest code, or 4, below which the codes lie
closer together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mixquant.formats import e2m1

BlockScale = Literal["6", "4/6"]

BLOCK = 16
E4M3_MAX = 448.0

# The block scale that a tensor's largest value gets where it becomes 6. Under 4/6 the scale that
# makes it 4 is 1.5 times that and has to fit as well; 256, which the paper's authors take, and 384
# are both E4M3 numbers, so either represents the largest value exactly.
_LARGEST_BLOCK_SCALE: dict[BlockScale, float] = {"6": E4M3_MAX, "4/6": 256.0}

# Up to here the smallest block scale, 2**-9, times the tensor scale is a normal FP32 number, whose
# reciprocal is finite. Only tensors with nothing above 2e-32 would ask for more.
_GLOBAL_SCALE_MAX = 2.0**117

# Rows are quantized with this global scale, whatever they hold, after a power of two has brought
# their largest magnitude into [2**e, 2**(e + 1)), e from the table below: the block scales of the
# largest value then stay below 2**11 / 6 = 342 or, under 4/6, 2**10 / 4 = 256, and one e more would
# pass 448. Being a power of two, the row scale costs no rounding in BF16 or FP32, and being 1, nor
# does the constant. The price, against a scale that makes the largest block scale 448 (256), is
# less than two of the eighteen octaves down to E4M3's smallest, 2**-9.
ROW_GLOBAL_SCALE = 1.0
_ROW_EXPONENT: dict[BlockScale, int] = {"6": 10, "4/6": 9}


def global_scale(amax: Tensor, block_scale: BlockScale = "6") -> Tensor:
    """The global scale for a tensor whose largest magnitude is `amax` (FP32, any shape).

    ``448 * 6 / amax``, or ``256 * 6 / amax`` for 4/6. It is finite for an amax of zero, too, where
    the formula is not; at the limit, 2**117, such tensors become all zeros.
    """
    # This very expression is vLLM's: PyTorch computes it as reciprocal times constant, and one
    # bit of difference here changes codes that lie on a tie.
    return (_LARGEST_BLOCK_SCALE[block_scale] * e2m1.MAX / amax).clamp(max=_GLOBAL_SCALE_MAX)


def quantize(
    x: Tensor, global_scale: Tensor, block_scale: BlockScale = "6"
) -> tuple[Tensor, Tensor]:
    """Quantizes with a given global scale; bit-exact, for "6", to vLLM's ``ref_nvfp4_quant``.

    Like the reference, it saturates where `global_scale` is too large for a block, gives blocks
    that are too small for it the scale zero, and propagates a block's NaN through its scale. An
    oddity that it follows: with a scale of zero the codes are those of ``x * 1e-8``, so not all
    zero if x itself is beyond 2.5e7. The one departure: where `global_scale` is beyond 2**117 and
    the reference's reciprocal overflows, so that zeros become NaN, ours stays finite.

    Args:
        x: ``[..., K]``, BF16, FP16 or FP32.
        global_scale: FP32, one element.
        block_scale: "6", or "4/6": per block, whichever of 6 and 4 gives the dequantized block the
            lower squared error; 6 if equal (arXiv 2512.02010; "mse" in the authors' fouroversix).

    Returns:
        Packed codes, uint8 ``[..., K/2]``, and block scales, float8_e4m3fn ``[..., K/16]``.

    Raises:
        ValueError: K is not a multiple of 16, another type, or an unknown `block_scale`.
    """
    check(x, block_scale)
    k = x.shape[-1]
    codes, scales = in_parts(
        lambda rows: quantize_matrix(rows, global_scale, block_scale), x.reshape(-1, k)
    )
    return codes.view(*x.shape[:-1], k // 2), scales.view(*x.shape[:-1], k // BLOCK)


def in_parts(quantize_rows: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    """Quantizes a matrix; on a CPU some rows at a time, whose intermediate results stay in its
    caches (2 to 3 times faster)."""
    if not x.is_cpu:
        return list(quantize_rows(x))
    parts = [quantize_rows(rows) for rows in torch.split(x, max(1, 2**18 // x.shape[1]))]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def quantize_matrix(
    x: Tensor, global_scale: Tensor, block_scale: BlockScale
) -> tuple[Tensor, Tensor]:
    """`quantize` for a matrix, with all its arguments checked."""
    blocks = x.float().view(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = global_scale * (amax * (1 / e2m1.MAX))
    codes, scales = _quantize_blocks(blocks, scale, global_scale)
    if block_scale == "4/6":
        codes4, scales4 = _quantize_blocks(blocks, scale * 1.5, global_scale)
        scaled = blocks * global_scale
        better = _squared_error(codes4, scales4, scaled) < _squared_error(codes, scales, scaled)
        codes = torch.where(better, codes4, codes)
        scales = torch.where(better, scales4.view(torch.uint8), scales.view(torch.uint8)).view(
            torch.float8_e4m3fn
        )
    return codes.flatten(-2), scales.squeeze(-1)


def _quantize_blocks(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[..., 8]`` and E4M3 scales ``[..., 1]`` of blocks ``[..., 16]``."""
    scales = scale.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    factor = _reciprocal(scales.float() * _reciprocal(global_scale))
    return e2m1.pack(e2m1.encode(blocks * factor)), scales


def _reciprocal(x: Tensor) -> Tensor:
    # vLLM's stand-in for the reciprocal of zero. The limit keeps zero times it from being NaN.
    return (1.0 / (x + (x == 0) * 1e8)).clamp(max=torch.finfo(torch.float32).max)


def _squared_error(codes: Tensor, scales: Tensor, scaled: Tensor) -> Tensor:
    # In the units of codes times block scales, where squares neither overflow nor vanish.
    return (unscaled(codes, scales).float() - scaled).square_().sum(dim=-1, keepdim=True)


def unscaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times block scales, BF16 ``[..., K]``, of codes ``[..., K/2]``, scales ``[..., K/16]``.

    Exact: E2M1 has 2 significant bits and E4M3 has 4, so a product has at most 6 of BF16's 8, and
    lies between 2**-10 and 2688 in magnitude.
    """
    pairs = e2m1.PAIRS.to(codes.device).index_select(0, codes.flatten().int())
    values = pairs.view(torch.bfloat16).view(*scales.shape, BLOCK)
    return (values * scales.to(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def scale_rows(x: Tensor, block_scale: BlockScale = "6") -> tuple[Tensor, Tensor]:
    """Brings each row into the range in which the global scale 1 quantizes it.

    Args:
        x: ``[M, K]``, BF16 or FP32, which have the range for it.

    Returns:
        The rows over their scales, in the type of `x`, exact but for what underflows; and the scales,
        ``[M, 1]`` FP32, powers of two, NaN for rows that hold inf or NaN.
    """
    row_scale = _row_scale(x.abs().amax(dim=-1, keepdim=True).float(), block_scale)
    return x * row_scale.reciprocal().to(x.dtype), row_scale


def dequantize(codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """The FP32 values; bit-exact to vLLM's ``dequantize_to_dtype``.

    Args:
        codes: packed, uint8 ``[..., K/2]``.
        block_scales: float8_e4m3fn ``[..., K/16]``, linear.
        tensor_scale: FP32, broadcastable to ``[..., K/16]``: the reciprocal of the global scale.
    """
    scales = (block_scales.float() * tensor_scale).unsqueeze(-1)
    values = e2m1.decode(e2m1.unpack(codes)).view(*block_scales.shape, BLOCK)
    return (values * scales).flatten(-2)


def _row_scale(amax: Tensor, block_scale: BlockScale) -> Tensor:
    """Powers of two ``[M, 1]`` for the largest magnitudes of rows ``[M, 1]`` (FP32)."""
    # On the exponent's bits, since logarithms and powers round. Not below the smallest normal
    # number, whose reciprocal is still finite: rows below 2**-116 use less of the range.
    exponent = amax.view(torch.int32) >> 23
    bits = (exponent - _ROW_EXPONENT[block_scale]).clamp_(min=1) << 23
    scale = bits.view(torch.float32).masked_fill(amax == 0, 1.0)
    return scale.masked_fill(~amax.isfinite(), torch.nan)


def check(x: Tensor, block_scale: str, matrix: bool = False) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"NVFP4 quantizes BF16, FP16 or FP32, not {x.dtype}")
    if matrix and x.ndim != 2:
        raise ValueError(f"expected a matrix, got the shape {list(x.shape)}")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension of {list(x.shape)} is not a multiple of {BLOCK}")
    if block_scale not in _LARGEST_BLOCK_SCALE:
        raise ValueError(f"block_scale {block_scale!r} is neither '6' nor '4/6'")
