# mypy: allow-untyped-defs, allow-incomplete-defs
"""The product of a few rows with a BF16 weight, on as many multiprocessors as one likes, in Triton.

A library's kernel for few rows takes all multiprocessors, which then wait for memory together. A few of
them draw much more than their share. So beside a product that computes, on a stream of its own, a kernel
on a few multiprocessors costs what these would have computed, which is less than the time that it takes.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.launching import launch

MOST_ROWS = 16

# Features and depth of a tile of the weight, warps, tiles in flight. With the first, a multiprocessor
# draws more; with the second, a small weight makes more programs (docs/performance.md).
_ON_FEW = (128, 128, 8, 6)
_ON_ALL = (64, 256, 4, 5)
_FEW = 32  # multiprocessors


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
    if rows_of_x is not None:
        of_x = tl.load(rows_of_x + row, there, 0)
    if rows_of_out is not None:
        of_out = tl.load(rows_of_out + row, there, 0)
    for tile in range(tl.program_id(0), tl.cdiv(N, FEATURES), tl.num_programs(0)):
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
    programs: int,
    rows_of_x: Tensor | None = None,
    rows_of_out: Tensor | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Writes ``x @ weight.T`` into ``out``: FP32 sums, rounded once.

    Args:
        x: BF16 ``[M, K]``, up to `MOST_ROWS` rows, each contiguous.
        weight: BF16 ``[N, K]``, contiguous.
        out: BF16 ``[M, N]``, each row contiguous.
        programs: how many multiprocessors it takes at the most, one each.
        rows_of_x: int64 ``[M]``, if the M rows are these of a larger ``x``.
        rows_of_out: int64 ``[M]``, if they go to these of a larger ``out``.
        stream: where it is launched, if not on the current one.

    Raises:
        ValueError: too many rows.
    """
    which = rows_of_x if rows_of_x is not None else x if rows_of_out is None else rows_of_out
    rows = which.shape[0]
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} rows; this kernel takes up to {MOST_ROWS}")
    features, depth = weight.shape
    tile = _ON_FEW if programs <= _FEW else _ON_ALL
    tiles = -(-features // tile[0])
    strides = x.stride(0), out.stride(0)
    launch(
        few_rows_kernel,
        (min(programs, tiles), 1, 1),
        (x, weight, out, rows_of_x, rows_of_out),
        (rows, features, depth, *strides),
        {"ROWS": MOST_ROWS, "FEATURES": tile[0], "DEPTH": tile[1]},
        (
            "few rows",
            x.device,
            tile,
            rows_of_x is None,
            rows_of_out is None,
            features,
            depth,
            strides,
        ),
        stream,
        num_warps=tile[2],
        num_stages=tile[3],
    )


def compile_for(capability: int, programs: int) -> Any:
    """Compiles the kernel for a GPU that need not be there.

    Args:
        capability: compute capability times ten: 90.
        programs: as `few_rows` would be given; it chooses among kernels.

    Returns:
        Triton's compiled kernel, with ``asm["ptx"]``.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped]

    features, depth, warps, stages = _ON_FEW if programs <= _FEW else _ON_ALL
    constants = {"ROWS": MOST_ROWS, "FEATURES": features, "DEPTH": depth}
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
        options={"num_warps": warps, "num_stages": stages},
    )
