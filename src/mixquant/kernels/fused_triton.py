# mypy: allow-untyped-defs, allow-incomplete-defs
"""What produces an activation, fused with what quantizes it: RMSNorm and SiLU-and-multiply, in Triton.

A quantizer by itself reads the activation from memory once more. These kernels write the codes of a
row while they hold it: FP8 (a scale per row) as `mixquant.formats.fp8`, NVFP4 (a power of two per row,
an E4M3 scale per 16) as `mixquant.kernels.nvfp4_triton`, of values rounded to BF16 as the unfused
layers round them.

Importing this module imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.nvfp4_triton import quantize, row_scale

LONGEST_ROW = 32768  # elements; a program holds one row

_LARGEST = tl.constexpr(448.0)
_LEAST_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))  # as MIN_SCALE of formats/fp8.py


@triton.jit
def _write_fp8(values, codes, scale, row, columns, K):
    """Codes and scale of one row of FP32 values, zero beyond K."""
    # As integers, magnitudes are ordered as the numbers are, and inf and NaN are the largest.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    step = tl.div_rn(bits.to(tl.float32, bitcast=True), _LARGEST)
    step = tl.maximum(step, _LEAST_SCALE, tl.PropagateNan.ALL)
    # A division of each value would take longer than reading it.
    scaled = values * tl.div_rn(1.0, step)
    tl.store(codes + row * K + columns, scaled.to(tl.float8e4nv), columns < K)
    tl.store(scale + row, step)


@triton.jit
def _write_nvfp4(values, codes, block_scales, scale, row, K, TILE: tl.constexpr):
    """Codes, block scales and scale of one row of FP32 values, zero beyond K."""
    step = row_scale(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0) >> 16)
    packed, scales = quantize(values[None, :] * tl.div_rn(1.0, step), 1, TILE)
    pair = tl.arange(0, TILE // 2)
    tl.store(codes + row * (K // 2) + pair[None, :], packed, (pair < K // 2)[None, :])
    block = tl.arange(0, TILE // 16)
    tl.store(block_scales + row * (K // 16) + block[None, :], scales, (block < K // 16)[None, :])
    tl.store(scale + row, step)


@triton.jit
def silu_and_mul_kernel(x, codes, block_scales, scale, K, stride_x, TILE: tl.constexpr):
    """One program per row; `silu_and_mul` says what the tensors are."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    there = columns < K
    gate = tl.load(x + row * stride_x + columns, there, 0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + K + columns, there, 0.0).to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up
    if block_scales is None:
        _write_fp8(values, codes, scale, row, columns, K)
    else:
        _write_nvfp4(values, codes, block_scales, scale, row, K, TILE)


# Not compiled anew for a row range that happens to begin at 1 or at a multiple of 16.
@triton.jit(do_not_specialize=["first", "count"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    codes,
    block_scales,
    scale,
    first,
    count,
    K,
    stride_x,
    stride_residual,
    epsilon,
    TILE: tl.constexpr,
):
    """One program per row; `rms_norm` says what the tensors are."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    there = columns < K
    values = tl.load(x + row * stride_x + columns, there, 0.0).to(tl.float32)
    values += tl.load(residual + row * stride_residual + columns, there, 0.0).to(tl.float32)
    tl.store(total + row * K + columns, values.to(tl.bfloat16), there)
    variance = tl.sum(values * values, 0) / K
    values = (values * tl.rsqrt(variance + epsilon)).to(tl.bfloat16)
    values = values.to(tl.float32) * tl.load(weight + columns, there, 0.0).to(tl.float32)
    normed = values.to(tl.bfloat16)
    tl.store(out + row * K + columns, normed, there)
    if codes is not None:
        at = row - first
        if (at >= 0) & (at < count):
            values = normed.to(tl.float32)
            if block_scales is None:
                _write_fp8(values, codes, scale, at, columns, K)
            else:
                _write_nvfp4(values, codes, block_scales, scale, at, K, TILE)


@dataclass(frozen=True)
class Codes:
    """Quantized rows ``[M, K]``.

    FP8: E4M3 codes ``[M, K]``, FP32 scale ``[M, 1]``. NVFP4: packed codes ``[M, K/2]`` uint8, E4M3
    block scales ``[M, K/16]``, linear, and the FP32 power of two of each row, ``[M, 1]``.
    """

    codes: Tensor
    scale: Tensor
    block_scales: Tensor | None = None


def room_for(fmt: str, rows: int, width: int, device: torch.device) -> Codes:
    """Uninitialized codes of rows ``[rows, width]`` in the format "fp8" or "nvfp4"."""
    scale = torch.empty(rows, 1, device=device)
    if fmt == "fp8":
        return Codes(torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device), scale)
    packed = torch.empty(rows, width // 2, dtype=torch.uint8, device=device)
    blocks = torch.empty(rows, width // 16, dtype=torch.float8_e4m3fn, device=device)
    return Codes(packed, scale, blocks)


def why_not(fmt: str, width: int) -> str | None:
    """Why rows of this many elements are not quantized here, or None if they are."""
    if width > LONGEST_ROW:
        return f"{width} elements; one program holds up to {LONGEST_ROW}"
    if fmt == "nvfp4" and width % 16:
        return f"{width} is not a multiple of 16"
    return None


def silu_and_mul(x: Tensor, into: Codes) -> None:
    """Quantizes ``silu(gate) * up``, which is not rounded before.

    Args:
        x: BF16 ``[M, 2 K]``, the gates and then the ups, each row contiguous.
        into: of ``[M, K]``, contiguous.
    """
    rows, width = len(x), x.shape[1] // 2
    if rows == 0:
        return
    _launch(
        silu_and_mul_kernel,
        rows,
        (x, into.codes, into.block_scales, into.scale, width, x.stride(0)),
        width,
    )


def rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    into: Codes | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x + residual`` in BF16, of which some rows are quantized as well.

    Args:
        x, residual: BF16 ``[M, K]``, each row contiguous.
        weight: BF16 ``[K]``.
        into: of ``[rows, K]``, contiguous, for rows from ``first`` on; None for BF16 alone.

    Returns:
        The normalized rows, and the sums, both BF16 ``[M, K]``.
    """
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    if rows:
        codes = (None, None, None) if into is None else (into.codes, into.block_scales, into.scale)
        count = 0 if into is None else len(into.scale)
        sizes = (width, x.stride(0), residual.stride(0), epsilon)
        _launch(
            rms_norm_kernel,
            rows,
            (x, residual, weight, out, total, *codes, first, count, *sizes),
            width,
        )
    return out, total


# Finding the compiled kernel takes Triton as long as launching it, which tells where a pass is so short
# that the GPU waits for the CPU: so it is kept, by all that Triton compiles anew for.
_compiled: dict[Any, Any] = {}


def _launch(kernel: Any, rows: int, arguments: tuple[Any, ...], width: int) -> None:
    x = arguments[0]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    key = None
    if not any(tensor.data_ptr() & 15 for tensor in tensors):
        kinds = tuple(None if argument is None else argument.__class__ for argument in arguments)
        strides = tuple(tensor.stride(0) for tensor in tensors)
        key = (kernel, x.device, x.dtype, tensors[1].dtype, width, strides, kinds)
    found = _compiled.get(key)
    if found is not None:
        found[rows, 1, 1](*arguments, triton.next_power_of_2(width))
        return
    options = _options(triton.next_power_of_2(width))
    found = kernel[(rows,)](*arguments, **options)
    if key is not None and found is not None:  # None in Triton's interpreter
        _compiled[key] = found


def _options(tile: int) -> dict[str, Any]:
    # 16 elements a thread; quantize() relies on products being rounded before they are added to.
    warps = max(1, min(32, tile // (32 * 16)))
    return {"TILE": tile, "num_warps": warps, "enable_fp_fusion": False}


_POINTERS = {
    "x": "*bf16",
    "residual": "*bf16",
    "weight": "*bf16",
    "out": "*bf16",
    "total": "*bf16",
    "scale": "*fp32",
    "epsilon": "fp32",
}
_CODES = {"fp8": {"codes": "*fp8e4nv"}, "nvfp4": {"codes": "*u8", "block_scales": "*fp8e4nv"}}


def compile_for(capability: int, fmt: str, width: int = 4096) -> dict[str, Any]:
    """Compiles both kernels for a GPU that need not be there.

    Args:
        capability: compute capability times ten: 90, 100, 120.
        fmt: "fp8" or "nvfp4".
        width: of the quantized rows.

    Returns:
        Triton's compiled kernels, "silu_and_mul" and "rms_norm", each with ``asm["ptx"]``.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    types = _POINTERS | _CODES[fmt]
    options = _options(triton.next_power_of_2(width))
    constants = {"TILE": options.pop("TILE")} | ({"block_scales": None} if fmt == "fp8" else {})
    compiled = {}
    for name, kernel in (("silu_and_mul", silu_and_mul_kernel), ("rms_norm", rms_norm_kernel)):
        signature = {
            argument: "constexpr" if argument in constants else types.get(argument, "i32")
            for argument in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        compiled[name] = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=options
        )
    return compiled
