# mypy: allow-untyped-defs, allow-incomplete-defs
"""NVFP4's product in Triton, which quantizes its activation rows itself: our portable native path.

Weights come as `mixquant.formats.nvfp4` holds them for the emulation, the block scales linear.
Rows become what ``NVFP4.quantize_rows(x, kernel, "6")`` makes of them, bit by bit. Triton turns one
``tl.dot_scaled`` into FP4 tensor core instructions on Blackwell (``tcgen05.mma`` on 10.x,
``mma.sync`` on 12.x, both ``kind::mxf4nvf4``) and, on what came before, into BF16 ones on exactly
dequantized operands.

Importing this module imports Triton, which has to be 3.9 or newer: 3.6 refuses E4M3 scales.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

# As _ROW_EXPONENT["6"] of formats/nvfp4_blocks.py, where the reason stands. Kernels import no formats.
_ROW_EXPONENT = tl.constexpr(10)
_INTEGERS = tl.constexpr(1.5 * 2**23)

_ROW_SCALE_TILE = {"TILE_K": 1024}
# One size for all: prefill has many rows. Eight tiles of rows go through all columns of the weight
# before the next eight do, so that both stay in the L2 cache.
_TILES = {"TILE_M": 128, "TILE_N": 128, "TILE_K": 64, "GROUP_M": 8}
_ROW_SCALE_OPTIONS = {"num_warps": 4}
# Without fusion, since a product is to be rounded before it meets _INTEGERS.
_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit
def row_scale(bits):
    """The power of two of a row whose largest magnitude has these bits as a BF16 number."""
    exponent = bits >> 7
    # Not below the smallest normal number, whose reciprocal is still finite.
    scale = (tl.maximum(exponent - _ROW_EXPONENT, 1) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(bits == 0, 1.0, scale)
    return tl.where(exponent == 255, float("nan"), scale)


@triton.jit
def row_scales_kernel(x, scales, K, stride_x, TILE_K: tl.constexpr):
    """The power of two of each row; one program per row. `linear` says what the tensors are."""
    row = tl.program_id(0)
    largest = tl.zeros([TILE_K], tl.int32)
    for start in range(0, K, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        values = tl.load(x + row.to(tl.int64) * stride_x + columns, columns < K, 0.0)
        # As integers, magnitudes are ordered as the numbers are, and inf and NaN are the largest.
        largest = tl.maximum(largest, values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF)
    tl.store(scales + row, row_scale(tl.max(largest, 0)))


@triton.jit
def quantize(x, TILE_M: tl.constexpr, TILE_K: tl.constexpr):
    """Packed codes ``[TILE_M, TILE_K/2]`` and E4M3 scales ``[TILE_M, TILE_K/16]`` of an FP32 tile."""
    blocks = tl.reshape(x, [TILE_M, TILE_K // 16, 16])
    scales = (tl.max(tl.abs(blocks), 2) * (1 / 6)).to(tl.float8e4nv)
    # The reference's reciprocal of zero is 1e-8. Triton's own division is off by up to 2 ulp.
    factor = tl.div_rn(1.0, tl.where(scales.to(tl.float32) == 0, 1e8, scales.to(tl.float32)))
    blocks *= factor[:, :, None]
    # encode of formats/e2m1.py, with _INTEGERS added: there FP32 numbers are one apart, so that
    # the sum is rounded as round_ does, and its last bits are the index. Of a NaN, minimum makes 7.
    magnitude = tl.abs(blocks)
    index = tl.minimum(magnitude * 2 + _INTEGERS, (magnitude + _INTEGERS) + 2)
    index = tl.minimum(index, (magnitude * 0.5 + _INTEGERS) + 4)
    index = tl.minimum(index, _INTEGERS + 7).to(tl.int32, bitcast=True) & 7
    codes = (index | tl.where(blocks < 0, 8, 0)).to(tl.uint8)
    low, high = tl.split(tl.reshape(codes, [TILE_M, TILE_K // 2, 2]))
    return low | (high << 4), scales


@triton.jit
def linear_kernel(
    x,
    scales,
    codes,
    block_scales,
    tensor_scale,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_out,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the product per program. `linear` says what the tensors are."""
    m, n = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP_M
    )
    rows, columns = m * TILE_M + tl.arange(0, TILE_M), n * TILE_N + tl.arange(0, TILE_N)
    is_row, is_column = rows < M, columns < N
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    x_row = x + wide_rows[:, None] * stride_x
    codes_row = codes + wide_columns * (K // 2)
    scales_row = block_scales + wide_columns[:, None] * (K // 16)
    scale = tl.load(scales + rows, is_row, 1.0)
    inverse = tl.div_rn(1.0, scale)

    product = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        k = start + tl.arange(0, TILE_K)
        pair = start // 2 + tl.arange(0, TILE_K // 2)
        block = start // 16 + tl.arange(0, TILE_K // 16)
        # What lies outside is zero, codes and scales alike.
        values = tl.load(x_row + k[None, :], is_row[:, None] & (k < K)[None, :], 0.0)
        b_mask = (pair < K // 2)[:, None] & is_column[None, :]
        b = tl.load(codes_row[None, :] + pair[:, None], b_mask, 0)
        b_scale_mask = is_column[:, None] & (block < K // 16)[None, :]
        b_scale = tl.load(scales_row + block[None, :], b_scale_mask, 0.0)
        a, a_scale = quantize(values.to(tl.float32) * inverse[:, None], TILE_M, TILE_K)
        product = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1", product)

    # One by one: the product of the two scales alone may leave FP32's range.
    result = product * tl.load(tensor_scale) * scale[:, None]
    if bias is not None:
        result += tl.load(bias + columns, is_column, 0.0).to(tl.float32)[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out + wide_rows[:, None] * stride_out + columns[None, :], result.to(tl.bfloat16), mask)


def linear(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Writes ``quantized(x) @ weight.T + bias`` into `out`.

    Args:
        x: BF16 ``[M, K]``, K a multiple of 32, any row stride.
        codes: the weight's, packed, uint8 ``[N, K/2]``, contiguous.
        block_scales: the weight's, float8_e4m3fn ``[N, K/16]``, linear, contiguous.
        tensor_scale: FP32 ``[1]``.
        bias: BF16 ``[N]``, or None.
        out: BF16 ``[M, N]``, any row stride.

    Raises:
        ValueError: a shape, type or layout is another.
    """
    _check(x, codes, block_scales, tensor_scale, bias, out)
    (m, k), n = x.shape, codes.shape[0]
    if m == 0 or n == 0:
        return
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    row_scales_kernel[(m,)](x, scales, k, x.stride(0), **_ROW_SCALE_TILE, **_ROW_SCALE_OPTIONS)
    grid = (triton.cdiv(n, _TILES["TILE_N"]), triton.cdiv(m, _TILES["TILE_M"]))
    linear_kernel[grid](
        *(x, scales, codes, block_scales, tensor_scale, bias, out),
        *(m, n, k, x.stride(0), out.stride(0)),
        **_TILES,
        **_OPTIONS,
    )


def _check(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % 32:
        raise ValueError(f"x is {list(x.shape)}, not [M, K] with K a multiple of 32")
    (m, k), n = x.shape, codes.shape[0]
    expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "x": (x, torch.bfloat16, (m, k)),
        "codes": (codes, torch.uint8, (n, k // 2)),
        "block_scales": (block_scales, torch.float8_e4m3fn, (n, k // 16)),
        "tensor_scale": (tensor_scale, torch.float32, (1,)),
        "bias": (bias, torch.bfloat16, (n,)),
        "out": (out, torch.bfloat16, (m, n)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
            )
        rows_apart = name in ("x", "out") and tensor.stride(1) == 1
        if not rows_apart and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")


_POINTERS = {
    "x": "*bf16",
    "scales": "*fp32",
    "codes": "*u8",
    "block_scales": "*fp8e4nv",
    "tensor_scale": "*fp32",
    "bias": "*bf16",
    "out": "*bf16",
}


def compile_for(capability: int) -> dict[str, Any]:
    """Compiles the kernels for a GPU that need not be there.

    They may assume what holds for linear layers' usual sizes: pointers, K and the row strides of x
    and out are multiples of 16. (In `linear` Triton looks at the arguments, and compiles again where
    they are not.)

    Args:
        capability: compute capability times ten: 90, 100, 120.

    Returns:
        Triton's compiled kernels, "row_scales", "linear" and "linear_bias". Each has ``asm["ptx"]``,
        ``asm["cubin"]`` and ``metadata``; ``src.signature`` names the arguments and their types, the
        constants among them.
    """
    return {
        "row_scales": _compile(
            row_scales_kernel, capability, dict(_ROW_SCALE_TILE), _ROW_SCALE_OPTIONS
        ),
        "linear": _compile(linear_kernel, capability, {**_TILES, "bias": None}, _OPTIONS),
        "linear_bias": _compile(linear_kernel, capability, dict(_TILES), _OPTIONS),
    }


def _compile(
    kernel: Any, capability: int, constants: dict[str, int | None], options: dict[str, int]
) -> Any:
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    signature = {
        name: "constexpr" if name in constants else _POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {*_POINTERS, "K", "stride_x", "stride_out"} - constants.keys()
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in aligned
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
