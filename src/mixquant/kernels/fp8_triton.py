# mypy: allow-untyped-defs, allow-incomplete-defs
"""FP8 in Triton: keys and values out of a paged cache, and queries, as attention multiplies them.

Codes are E4M3, of the values as they are: E4M3 is a floating-point format, whose relative error is
the same over four orders of magnitude, and without a scale no token's code depends on another's.
What exceeds its largest number becomes that.

Importing this module imports Triton.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.launching import launch

LARGEST = tl.constexpr(448.0)
_TOKENS = 32  # per program


# Not compiled anew for a number of tokens that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["tokens"])
def encode_kernel(
    x, out, tokens, heads, stride_t, stride_h, SIZE: tl.constexpr, TOKENS: tl.constexpr
):
    """Codes of ``[tokens, heads, SIZE]``; one program for some tokens of one head."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    wide = token.to(tl.int64)
    column = tl.arange(0, SIZE)
    there = (token < tokens)[:, None]
    values = tl.load(x + wide[:, None] * stride_t + head * stride_h + column[None, :], there, 0.0)
    values = values.to(tl.float32)
    values = tl.minimum(
        tl.maximum(values, -LARGEST, tl.PropagateNan.ALL), LARGEST, tl.PropagateNan.ALL
    )
    to = out + (wide[:, None] * heads + head) * SIZE + column[None, :]
    tl.store(to, values.to(tl.float8e4nv), there)


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    keys,
    values,
    pages,
    k,
    v,
    tokens,
    heads,
    page_size,
    stride_p,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The same of the first tokens of a sequence in a paged cache; see `gather`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    cache, out = keys, k
    if tl.program_id(2) == 1:
        cache, out = values, v
    there = token < tokens
    page = tl.load(pages + token // page_size, there, 0).to(tl.int64)
    column = tl.arange(0, SIZE)
    start = page * stride_p + (token % page_size) * stride_t + head * stride_h
    found = tl.load(cache + start[:, None] + column[None, :], there[:, None], 0.0)
    found = found.to(tl.float32)
    found = tl.minimum(
        tl.maximum(found, -LARGEST, tl.PropagateNan.ALL), LARGEST, tl.PropagateNan.ALL
    )
    to = out + (token.to(tl.int64)[:, None] * heads + head) * SIZE + column[None, :]
    tl.store(to, found.to(tl.float8e4nv), there[:, None])


def encode(x: Tensor, out: Tensor) -> None:
    """Writes the codes of ``x`` ``[tokens, heads, size]`` (BF16, FP16 or FP32) into ``out``.

    Args:
        x: its last dimension contiguous, its size a power of two.
        out: E4M3 of the same shape, contiguous.
    """
    tokens, heads, size = x.shape
    launch(
        encode_kernel,
        (-(-tokens // _TOKENS), heads, 1),
        (x, out),
        (tokens, heads, x.stride(0), x.stride(1)),
        {"SIZE": size, "TOKENS": _TOKENS},
        ("encode", x.device, x.dtype, heads, size, x.stride(0), x.stride(1)),
    )


def gather(keys: Tensor, values: Tensor, pages: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes the codes of a sequence's first tokens, which lie in pages of a cache.

    Args:
        keys, values: ``[pages, page_size, heads, size]``, of the same strides, the last dimension
            contiguous.
        pages: ``[pages of the sequence]`` int32, the row of the block table.
        k, v: E4M3 ``[tokens, heads, size]``, contiguous.
    """
    tokens, heads, size = k.shape
    strides = keys.stride()[:3]
    launch(
        gather_kernel,
        (-(-tokens // _TOKENS), heads, 2),
        (keys, values, pages, k, v),
        (tokens, heads, keys.shape[1], *strides),
        {"SIZE": size, "TOKENS": _TOKENS},
        ("gather", keys.device, keys.dtype, heads, size, keys.shape[1], *strides),
    )
