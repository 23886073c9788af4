"""NVFP4: E2M1 codes, one E4M3 scale per 16 elements along K, one FP32 scale per tensor.

An element is ``code * block_scale * tensor_scale``. Quantization follows vLLM's reference
(``ref_nvfp4_quant`` in ``nvfp4_emulation_utils.py``) bit by bit, and takes what that calls the
global scale: the factor that carries a tensor into the range of codes and block scales. The tensor
scale, which carries it back, is its reciprocal.

With ``block_scale="4/6"`` each block takes the better of two scales (Four Over Six,
arXiv 2512.02010): its largest value becomes 6, the largest code, or 4, below which the codes lie
closer together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.formats.base import EMULATION, Kernel
from mixquant.hardware import cuda_capability, cuda_formats

BlockScale = Literal["6", "4/6"]

BLOCK = 16
E2M1_MAX = 6.0
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
_ROW_GLOBAL_SCALE = 1.0
_ROW_EXPONENT: dict[BlockScale, int] = {"6": 10, "4/6": 9}

_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_E2M1_VALUES, *(-value for value in _E2M1_VALUES)], dtype=torch.float32)
# The two values of each byte, as BF16: one look-up of four bytes is far faster than two of two.
_E2M1_PAIRS = (
    torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
    .to(torch.bfloat16)
    .view(torch.int32)
    .flatten()
)


def encode_e2m1(x: Tensor) -> Tensor:
    """Rounds to the nearest E2M1 code, ties to the even one; what is beyond 6 becomes 6.

    Bit-exact to vLLM's ``cast_to_fp4``: negative values that round to zero become the code of
    negative zero (8), negative zero itself that of zero. Hardware keeps both signs; the numbers are
    the same. E2M1 has no NaN: here it becomes 6, and the block's scale has to carry it.

    Args:
        x: FP32, any shape.

    Returns:
        Codes 0 to 15, uint8, same shape: the sign in bit 3, the magnitude's index in
        {0, 0.5, 1, 1.5, 2, 3, 4, 6} below it.
    """
    magnitude = x.abs()
    # The index as a function of the magnitude is the lowest of three lines, one per spacing of the
    # codes. Each is rounded before its offset is added, while that is exact.
    index = (magnitude * 2).round_()
    index = torch.minimum(index, magnitude.round().add_(2))
    index = torch.minimum(index, magnitude.mul_(0.5).round_().add_(4))
    # fmin and not clamp: what a NaN becomes as an integer is undefined.
    index = torch.fmin(index, index.new_full((), 7.0))
    return index.to(torch.uint8) | ((x < 0).view(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """The FP32 values of E2M1 codes (integers 0 to 15), same shape."""
    return _E2M1.to(codes.device)[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Packs codes ``[..., K]`` (uint8, 0 to 15) two to a byte, ``[..., K/2]``.

    The even element is in the low nibble, as CUDA's ``__nv_fp4x2_storage_t`` and vLLM have it.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of codes ({codes.shape[-1]}) two to a byte")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes ``[..., K]`` (uint8, 0 to 15) of bytes ``[..., K/2]``; undoes `pack`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def swizzle_block_scales(scales: Tensor) -> Tensor:
    """Block scales in the order in which the tensor cores read them.

    Tiles of 128 x 4 scales, row-major; within a tile, row r and column c stand at
    ``(r % 32) * 16 + (r // 32) * 4 + c`` ("1D block scaling factors layout" in cuBLAS's manual;
    ``SwizzleType.SWIZZLE_32_4_4`` in PyTorch).

    Args:
        scales: ``[M, C]``, an 8-bit type; C is K/16.

    Returns:
        ``[M up to a multiple of 128, C up to a multiple of 4]``, same type, contiguous, to be read
        as a flat buffer. The padding is zero.
    """
    m, c = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -c % 4, 0, -m % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    # [row tile, r // 32, r % 32, column tile, c] -> [row tile, column tile, r % 32, r // 32, c]
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(scales.dtype)


def unswizzle_block_scales(swizzled: Tensor, m: int, c: int) -> Tensor:
    """The linear block scales ``[m, c]``; undoes `swizzle_block_scales`.

    Args:
        swizzled: an 8-bit type, contiguous, any shape of as many elements as `m` and `c` pad to.

    Raises:
        ValueError: it has another number of elements.
    """
    row_tiles, column_tiles = -(-m // 128), -(-c // 4)
    if swizzled.numel() != row_tiles * column_tiles * 512:
        raise ValueError(
            f"{swizzled.numel()} swizzled scales cannot be those of [{m}, {c}], "
            f"which pads to [{row_tiles * 128}, {column_tiles * 4}]"
        )
    tiles = swizzled.view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * 128, column_tiles * 4)
    return linear[:m, :c].contiguous().view(swizzled.dtype)


def global_scale(amax: Tensor, block_scale: BlockScale = "6") -> Tensor:
    """The global scale for a tensor whose largest magnitude is `amax` (FP32, any shape).

    ``448 * 6 / amax``, or ``256 * 6 / amax`` for 4/6. It is finite for an amax of zero, too, where
    the formula is not; at the limit, 2**117, such tensors become all zeros.
    """
    # This very expression is vLLM's: PyTorch computes it as reciprocal times constant, and one
    # bit of difference here changes codes that lie on a tie.
    return (_LARGEST_BLOCK_SCALE[block_scale] * E2M1_MAX / amax).clamp(max=_GLOBAL_SCALE_MAX)


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
    _check(x, block_scale)
    k = x.shape[-1]
    codes, scales = _in_parts(
        lambda rows: _quantize(rows, global_scale, block_scale), x.reshape(-1, k)
    )
    return codes.view(*x.shape[:-1], k // 2), scales.view(*x.shape[:-1], k // BLOCK)


def _in_parts(quantize_rows: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    """Quantizes a matrix; on a CPU some rows at a time, whose intermediate results stay in its
    caches (2 to 3 times faster)."""
    if not x.is_cpu:
        return list(quantize_rows(x))
    parts = [quantize_rows(rows) for rows in torch.split(x, max(1, 2**18 // x.shape[1]))]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _quantize(x: Tensor, global_scale: Tensor, block_scale: BlockScale) -> tuple[Tensor, Tensor]:
    """`quantize` for a matrix, with all its arguments checked."""
    blocks = x.float().view(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = global_scale * (amax * (1 / E2M1_MAX))
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
    return pack(encode_e2m1(blocks * factor)), scales


def _reciprocal(x: Tensor) -> Tensor:
    # vLLM's stand-in for the reciprocal of zero. The limit keeps zero times it from being NaN.
    return (1.0 / (x + (x == 0) * 1e8)).clamp(max=torch.finfo(torch.float32).max)


def _squared_error(codes: Tensor, scales: Tensor, scaled: Tensor) -> Tensor:
    # In the units of codes times block scales, where squares neither overflow nor vanish.
    return (_unscaled(codes, scales).float() - scaled).square_().sum(dim=-1, keepdim=True)


def _unscaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times block scales, BF16 ``[..., K]``, of codes ``[..., K/2]``, scales ``[..., K/16]``.

    Exact: E2M1 has 2 significant bits and E4M3 has 4, so a product has at most 6 of BF16's 8, and
    lies between 2**-10 and 2688 in magnitude.
    """
    pairs = _E2M1_PAIRS.to(codes.device).index_select(0, codes.flatten().int())
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
    values = decode_e2m1(unpack(codes)).view(*block_scales.shape, BLOCK)
    return (values * scales).flatten(-2)


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


def emulated_weight(codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> NVFP4Weight:
    """A weight for emulation out of what another quantizer made.

    Args:
        codes: ``[N, K/2]`` uint8, packed.
        block_scales: ``[N, K/16]`` float8_e4m3fn, linear.
        tensor_scale: ``[1]`` FP32.
    """
    return NVFP4Weight(
        codes=codes,
        block_scales=block_scales,
        tensor_scale=tensor_scale.view(1),
        unscaled=_unscaled(codes, block_scales),
        kernel=EMULATION,
        shape=(codes.shape[0], codes.shape[1] * 2),
    )


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
        _check(weight, block_scale, matrix=True)
        n, k = weight.shape
        if (reason := self.why_not(n, k, kernel)) is not None:
            raise ValueError(reason)
        scale = global_scale(weight.abs().amax().float(), block_scale)
        codes, scales = quantize(weight, scale, block_scale)
        return NVFP4Weight(
            codes=codes,
            block_scales=swizzle_block_scales(scales) if kernel.native else scales,
            tensor_scale=scale.reciprocal().view(1),
            unscaled=None if kernel.native else _unscaled(codes, scales),
            kernel=kernel,
            shape=(n, k),
        )

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
        _check(x, block_scale, matrix=True)
        global_scale = torch.full((), _ROW_GLOBAL_SCALE, dtype=torch.float32, device=x.device)

        def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled, row_scale = scale_rows(x.float(), block_scale)
            return *_quantize(scaled, global_scale, block_scale), row_scale

        codes, scales, row_scale = _in_parts(quantize_rows, x)
        if kernel.native:
            scales = swizzle_block_scales(scales)
        return NVFP4Rows(codes, scales, row_scale, kernel)

    def dequantize_rows(self, rows: NVFP4Rows) -> Tensor:
        """The FP32 matrix ``[M, K]`` that quantized rows stand for.

        Magnitudes within a sixteenth of FP32's largest may have been rounded to more than it
        holds, and come back as inf; `linear` applies the scales later and is spared that.
        """
        m, k = rows.codes.shape[0], rows.codes.shape[1] * 2
        scales = _linear_scales(rows.block_scales, rows.kernel, m, k)
        return dequantize(rows.codes, scales, rows.row_scale / _ROW_GLOBAL_SCALE)

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
            product = _matmul_fp32(_unscaled(rows.codes, rows.block_scales), weight.unscaled)
            product.mul_(weight.tensor_scale / _ROW_GLOBAL_SCALE)
        if bias is None:
            torch.mul(product, rows.row_scale, out=out)
        else:
            torch.addcmul(bias, product, rows.row_scale, out=out)


NVFP4 = _NVFP4()


def _check(x: Tensor, block_scale: str, matrix: bool = False) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"NVFP4 quantizes BF16, FP16 or FP32, not {x.dtype}")
    if matrix and x.ndim != 2:
        raise ValueError(f"expected a matrix, got the shape {list(x.shape)}")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension of {list(x.shape)} is not a multiple of {BLOCK}")
    if block_scale not in _LARGEST_BLOCK_SCALE:
        raise ValueError(f"block_scale {block_scale!r} is neither '6' nor '4/6'")


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    if (
        "nvfp4" in cuda_formats(cuda_capability(device))
        and hasattr(F, "scaled_mm")
        and hasattr(torch, "float4_e2m1fn_x2")
    ):
        return Kernel("torch.scaled_mm", native=True)
    return EMULATION


def _row_scale(amax: Tensor, block_scale: BlockScale) -> Tensor:
    """Powers of two ``[M, 1]`` for the largest magnitudes of rows ``[M, 1]`` (FP32)."""
    # On the exponent's bits, since logarithms and powers round. Not below the smallest normal
    # number, whose reciprocal is still finite: rows below 2**-116 use less of the range.
    exponent = amax.view(torch.int32) >> 23
    bits = (exponent - _ROW_EXPONENT[block_scale]).clamp_(min=1) << 23
    scale = bits.view(torch.float32).masked_fill(amax == 0, 1.0)
    return scale.masked_fill(~amax.isfinite(), torch.nan)


def _linear_scales(block_scales: Tensor, kernel: Kernel, m: int, k: int) -> Tensor:
    return unswizzle_block_scales(block_scales, m, k // BLOCK) if kernel.native else block_scales


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
            torch.full((1,), 1 / _ROW_GLOBAL_SCALE, dtype=torch.float32, device=rows.codes.device),
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
