# mypy: allow-untyped-defs, allow-incomplete-defs
"""SiLU-and-multiply, fused with what quantizes it, in Triton; and by itself, for precise rows.

A quantizer by itself reads the activation from memory once more. This kernel writes the codes of a row
while it holds it: FP8 (a scale per row) as `mixquant.formats.fp8`, NVFP4 (a power of two per row,
an E4M3 scale per 16) as `mixquant.kernels.nvfp4_triton`.

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


@triton.jit
def precise_kernel(x, out, K, stride_x, TILE: tl.constexpr):
    """Some columns of one row; see `precise_silu_and_mul`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = columns < K
    gate = tl.load(x + row * stride_x + columns, there, 0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + K + columns, there, 0.0).to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * K + columns, values.to(tl.bfloat16), there)


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
    arguments = (x, into.codes, into.block_scales, into.scale, width, x.stride(0))
    key = None
    if not any(tensor.data_ptr() % 16 for tensor in (x, into.codes, into.scale)):
        key = (x.device, into.codes.dtype, width, x.stride(0))
    if (found := _compiled.get(key)) is not None:
        found[rows, 1, 1](*arguments, triton.next_power_of_2(width))
        return
    found = silu_and_mul_kernel[(rows,)](*arguments, **_options(triton.next_power_of_2(width)))
    if key is not None and found is not None:  # None in Triton's interpreter
        _compiled[key] = found


def precise_silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up``, rounded once, as torch.compile has it.

    vLLM's kernel takes one multiprocessor for each row, which in decode shows.

    Args:
        x: BF16 ``[M, 2 K]``, the gates and then the ups, each row contiguous.

    Returns:
        BF16 ``[M, K]``.
    """
    rows, width = len(x), x.shape[1] // 2
    out = x.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        precise_kernel[grid](x, out, width, x.stride(0), _COLUMNS, num_warps=4)
    return out


_COLUMNS = 1024  # of a program


# Finding the compiled kernel takes Triton as long as launching it, which shows where a pass is so short
# that the GPU waits for the CPU: so it is kept, by all that Triton would compile anew for.
_compiled: dict[Any, Any] = {}


def _options(tile: int) -> dict[str, Any]:
    # 16 elements a thread; quantize() relies on products being rounded before they are added to.
    warps = max(1, min(32, tile // (32 * 16)))
    return {"TILE": tile, "num_warps": warps, "enable_fp_fusion": False}


_TYPES = {
    "fp8": {"codes": "*fp8e4nv"},
    "nvfp4": {"codes": "*u8", "block_scales": "*fp8e4nv"},
}


def compile_for(capability: int, fmt: str, width: int = 4096) -> Any:
    """Compiles the kernel for a GPU that need not be there.

    Args:
        capability: compute capability times ten: 90, 100, 120.
        fmt: "fp8" or "nvfp4".
        width: of the quantized rows.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]``.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    types = {"x": "*bf16", "scale": "*fp32", **_TYPES[fmt]}
    options = _options(triton.next_power_of_2(width))
    constants = {"TILE": options.pop("TILE")} | ({"block_scales": None} if fmt == "fp8" else {})
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in silu_and_mul_kernel.arg_names
    }
    source = ASTSource(silu_and_mul_kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
