# mypy: allow-untyped-defs, allow-incomplete-defs
"""The product of a few rows, out of a larger matrix and into another, with a BF16 weight, in Triton.

It waits for memory, so it keeps as many tiles of the weight in flight as fit.

Importing this module imports Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.triton import FEW_ROWS
from mixquant.kernels.triton.launching import launch

# Features and depth of a tile of the weight, warps, tiles in flight. With more features, a small weight
# would make too few programs.
_FEATURES, _DEPTH, _WARPS, _STAGES = 64, 256, 4, 5


# Not compiled anew for a number of rows that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x,
    weight,
    out,
    rows_of_x,
    rows_of_out,
    rows,
    N,
    K,
    stride_x,
    stride_out,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Each program takes every so many-th tile of features; see `few_rows`."""
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    there = row < rows
    of_x, of_out = row.to(tl.int64), row.to(tl.int64)
    tiles = tl.cdiv(N, FEATURES)
    if rows_of_out is not None:
        of_out = tl.load(rows_of_out + row, there, -1)
        there = of_out >= 0
        tiles = tl.where(tl.max(of_out, 0) >= 0, tiles, 0)
    if rows_of_x is not None:
        of_x = tl.load(rows_of_x + row, there, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        feature = tile * FEATURES + tl.arange(0, FEATURES)
        inside = feature < N
        sums = tl.zeros((FEATURES, ROWS), tl.float32)
        for start in range(0, K, DEPTH):
            column = start + depth
            weights = tl.load(
                weight + feature[:, None].to(tl.int64) * K + column[None, :],
                inside[:, None] & (column < K)[None, :],
                0.0,
            )
            values = tl.load(
                x + of_x[None, :] * stride_x + column[:, None],
                there[None, :] & (column < K)[:, None],
                0.0,
            )
            sums = tl.dot(weights, values, sums)
        to = out + of_out[None, :] * stride_out + feature[:, None]
        tl.store(to, sums.to(tl.bfloat16), there[None, :] & inside[:, None])


def few_rows(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    rows_of_x: Tensor | None = None,
    rows_of_out: Tensor | None = None,
) -> None:
    """Writes ``x @ weight.T`` into ``out``: FP32 sums, rounded once.

    Args:
        x: BF16 ``[M, K]``, up to `FEW_ROWS` rows, each contiguous.
        weight: BF16 ``[N, K]``, contiguous.
        out: BF16 ``[M, N]``, each row contiguous.
        rows_of_x: int64 ``[M]``, if the M rows are these of a larger ``x``.
        rows_of_out: int64 ``[M]``, if they go to these of a larger ``out``; -1 for none.

    Raises:
        ValueError: too many rows.
    """
    which = rows_of_x if rows_of_x is not None else x if rows_of_out is None else rows_of_out
    rows = which.shape[0]
    if rows > FEW_ROWS:
        raise ValueError(f"{rows} rows; this kernel takes up to {FEW_ROWS}")
    features, depth = weight.shape
    strides = x.stride(0), out.stride(0)
    launch(
        few_rows_kernel,
        (min(_multiprocessors(x.device), -(-features // _FEATURES)), 1, 1),
        (x, weight, out, rows_of_x, rows_of_out),
        (rows, features, depth, *strides),
        {"ROWS": FEW_ROWS, "FEATURES": _FEATURES, "DEPTH": _DEPTH},
        (
            "few rows",
            x.device,
            rows_of_x is None,
            rows_of_out is None,
            features,
            depth,
            strides,
        ),
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in Triton's interpreter
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_for(capability: int) -> Any:
    """Compiles the kernel for a GPU that need not be there.

    Args:
        capability: compute capability times ten: 90.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]``.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    constants = {"ROWS": FEW_ROWS, "FEATURES": _FEATURES, "DEPTH": _DEPTH}
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "rows_of_x": "*i64"}
    types["rows_of_out"] = "*i64"
    names = few_rows_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    # What a launch finds out by itself: all but the number of rows are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name != "rows"
    }
    source = ASTSource(few_rows_kernel, signature, constants, aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": _WARPS, "num_stages": _STAGES},
    )
