# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMSNorm and SiLU-and-multiply, fused with what quantizes them, in Triton; and unfused.

A quantizer by itself reads the activation from memory once more. These kernels write the codes of a row
while they hold it, in FP32: FP8 (a scale per row) as `mixquant.formats.fp8`, NVFP4 (a power of two per
row, an E4M3 scale per 16) as `mixquant.kernels.triton.nvfp4`.

Importing this module imports Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.triton.launching import launch
from mixquant.kernels.triton.nvfp4 import quantize, row_scale

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
def _silu_and_mul(x, row, columns, K, stride_x):
    """FP32 values of one row, zero beyond K."""
    there = columns < K
    gate = tl.load(x + row * stride_x + columns, there, 0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + K + columns, there, 0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _rms_norm(x, residual, weight, total, eps, row, columns, K, stride_x):
    """The same of RMSNorm; writes the sum that is normalized, where there is a place for it."""
    there = columns < K
    values = tl.load(x + row * stride_x + columns, there, 0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * K + columns, there, 0.0).to(tl.float32)
        if total is not None:
            tl.store(total + row * K + columns, values.to(tl.bfloat16), there)
    mean = tl.sum(values * values, 0) / K
    return values * tl.rsqrt(mean + eps) * tl.load(weight + columns, there, 0.0).to(tl.float32)


@triton.jit
def _write(
    values,
    codes,
    block_scales,
    scale,
    precise,
    precise_numbers,
    row,
    columns,
    K,
    TILE: tl.constexpr,
):
    """One row of FP32 values, zero beyond K, as `Codes` says; those with a place rounded once, too."""
    if precise is not None:
        place = tl.load(precise_numbers + row).to(tl.int64)
        if place >= 0:
            tl.store(precise + place * K + columns, values.to(tl.bfloat16), columns < K)
    if block_scales is None:
        _write_fp8(values, codes, scale, row, columns, K)
    else:
        _write_nvfp4(values, codes, block_scales, scale, row, K, TILE)


@triton.jit
def silu_and_mul_kernel(
    x, codes, block_scales, scale, precise, precise_numbers, K, stride_x, TILE: tl.constexpr
):
    """One program per row; `silu_and_mul` says what the tensors are."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    values = _silu_and_mul(x, row, columns, K, stride_x)
    _write(values, codes, block_scales, scale, precise, precise_numbers, row, columns, K, TILE)


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    codes,
    block_scales,
    scale,
    precise,
    precise_numbers,
    eps,
    K,
    stride_x,
    TILE: tl.constexpr,
):
    """One program per row; see `rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    values = _rms_norm(x, residual, weight, total, eps, row, columns, K, stride_x)
    _write(values, codes, block_scales, scale, precise, precise_numbers, row, columns, K, TILE)


@triton.jit
def precise_silu_kernel(x, out, K, stride_x, TILE: tl.constexpr):
    """Some columns of one row; see `precise_silu_and_mul`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    values = _silu_and_mul(x, row, columns, K, stride_x)
    tl.store(out + row * K + columns, values.to(tl.bfloat16), columns < K)


@triton.jit
def precise_norm_kernel(x, residual, weight, total, out, eps, K, stride_x, TILE: tl.constexpr):
    """One program per row; see `precise_rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    values = _rms_norm(x, residual, weight, total, eps, row, columns, K, stride_x)
    tl.store(out + row * K + columns, values.to(tl.bfloat16), columns < K)


@dataclass(frozen=True)
class Codes:
    """Quantized rows ``[M, K]``.

    FP8: E4M3 codes ``[M, K]``, FP32 scale ``[M, 1]``. NVFP4: packed codes ``[M, K/2]`` uint8, E4M3
    block scales ``[M, K/16]``, linear, and the FP32 power of two of each row, ``[M, 1]``.

    With ``precise``, BF16 ``[m, K]``, and ``precise_numbers``, int32 ``[M]``, rows whose number is not
    negative are written there as well, rounded once.
    """

    codes: Tensor
    scale: Tensor
    block_scales: Tensor | None = None
    precise: Tensor | None = None
    precise_numbers: Tensor | None = None


def empty_codes(fmt: str, rows: int, width: int, device: torch.device) -> Codes:
    """Uninitialized codes of rows ``[rows, width]`` in the format "fp8" or "nvfp4"."""
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    if fmt == "fp8":
        return Codes(torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device), scale)
    packed = torch.empty(rows, width // 2, dtype=torch.uint8, device=device)
    blocks = torch.empty(rows, width // 16, dtype=torch.float8_e4m3fn, device=device)
    return Codes(packed, scale, blocks)


def unsupported_width(fmt: str, width: int) -> str | None:
    """Why rows of this many elements are not quantized here, or None if they are."""
    if width > LONGEST_ROW:
        return f"{width} elements; one program holds up to {LONGEST_ROW}"
    if fmt == "nvfp4" and width % 16:
        return f"{width} is not a multiple of 16"
    return None


def silu_and_mul(x: Tensor, into: Codes) -> None:
    """Quantizes ``silu(gate) * up``.

    Args:
        x: BF16 ``[M, 2 K]``, the gates and then the ups, each row contiguous.
        into: of ``[M, K]``, contiguous.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    if rows == 0:
        return
    launch(
        silu_and_mul_kernel,
        (rows, 1, 1),
        (x, into.codes, into.block_scales, into.scale, into.precise, into.precise_numbers),
        (width, x.stride(0)),
        key=("silu", x.device, into.codes.dtype, into.precise is None, width, x.stride(0)),
        **_options(width),
    )


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    into: Codes,
    total: Tensor | None,
) -> None:
    """Quantizes ``x + residual``, divided by its root mean square and multiplied with ``weight``.

    Args:
        x: BF16 ``[M, K]``, each row contiguous.
        residual: BF16 ``[M, K]``, contiguous, or None: zeros.
        weight: BF16 ``[K]``.
        eps: added to the mean square.
        into: of ``[M, K]``, contiguous.
        total: BF16 ``[M, K]``, contiguous, where ``x + residual`` is written; None if that is None.
    """
    rows, width = x.shape
    if rows == 0:
        return
    absent = residual is None, into.precise is None
    launch(
        rms_norm_kernel,
        (rows, 1, 1),
        (
            x,
            residual,
            weight,
            total,
            into.codes,
            into.block_scales,
            into.scale,
            into.precise,
            into.precise_numbers,
        ),
        (eps, width, x.stride(0)),
        key=("norm", x.device, absent, into.codes.dtype, width, x.stride(0)),
        **_options(width),
    )


def precise_silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up``, rounded once, as torch.compile has it.

    vLLM's kernel takes one multiprocessor for each row, which in decode shows.

    Args:
        x: BF16 ``[M, 2 K]``, the gates and then the ups, each row contiguous.

    Returns:
        BF16 ``[M, K]``.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    if rows:
        launch(
            precise_silu_kernel,
            (rows, -(-width // _COLUMNS), 1),
            (x, out),
            (width, x.stride(0)),
            {"TILE": _COLUMNS},
            ("precise silu", x.device, width, x.stride(0)),
            num_warps=4,
        )
    return out


_COLUMNS = 1024  # of a program


def precise_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, total: Tensor | None
) -> Tensor:
    """What `rms_norm` quantizes, rounded once, as torch.compile has it.

    Args:
        x, residual, weight, eps, total: as of `rms_norm`.

    Returns:
        BF16 ``[M, K]``.
    """
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if rows:
        launch(
            precise_norm_kernel,
            (rows, 1, 1),
            (x, residual, weight, total, out),
            (eps, width, x.stride(0)),
            key=("precise norm", x.device, residual is None, width, x.stride(0)),
            **_options(width),
        )
    return out


@functools.cache
def _options(width: int) -> dict[str, Any]:
    tile = triton.next_power_of_2(width)
    # 16 elements a thread; quantize() relies on products being rounded before they are added to.
    warps = max(1, min(32, tile // (32 * 16)))
    return {"constants": {"TILE": tile}, "num_warps": warps, "enable_fp_fusion": False}


_TYPES = {
    "fp8": {"codes": "*fp8e4nv"},
    "nvfp4": {"codes": "*u8", "block_scales": "*fp8e4nv"},
}
KERNELS = {"silu_and_mul": silu_and_mul_kernel, "rms_norm": rms_norm_kernel}


def compile_for(capability: int, kernel: str, fmt: str, width: int = 4096) -> Any:
    """Compiles a kernel for a GPU that need not be there.

    Args:
        capability: compute capability times ten: 90, 100, 120.
        kernel: of `KERNELS`.
        fmt: "fp8" or "nvfp4".
        width: of the quantized rows.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]``.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    types = dict.fromkeys(("x", "residual", "weight", "total", "precise"), "*bf16")
    types |= {"precise_numbers": "*i32", "scale": "*fp32", "eps": "fp32", **_TYPES[fmt]}
    options = dict(_options(width))
    constants = options.pop("constants") | ({"block_scales": None} if fmt == "fp8" else {})
    function = KERNELS[kernel]
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    source = ASTSource(function, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
