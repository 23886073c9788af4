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
    cache,
    pages,
    out,
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
    there = token < tokens
    page = tl.load(pages + token // page_size, there, 0).to(tl.int64)
    column = tl.arange(0, SIZE)
    start = page * stride_p + (token % page_size) * stride_t + head * stride_h
    values = tl.load(cache + start[:, None] + column[None, :], there[:, None], 0.0)
    values = values.to(tl.float32)
    values = tl.minimum(
        tl.maximum(values, -LARGEST, tl.PropagateNan.ALL), LARGEST, tl.PropagateNan.ALL
    )
    to = out + (token.to(tl.int64)[:, None] * heads + head) * SIZE + column[None, :]
    tl.store(to, values.to(tl.float8e4nv), there[:, None])


def encode(x: Tensor, out: Tensor) -> None:
    """Writes the codes of ``x`` ``[tokens, heads, size]`` (BF16, FP16 or FP32) into ``out``.

    Args:
        x: its last dimension contiguous, its size a power of two.
        out: E4M3 of the same shape, contiguous.
    """
    tokens, heads, size = x.shape
    grid = (triton.cdiv(tokens, _TOKENS), heads)
    encode_kernel[grid](x, out, tokens, heads, x.stride(0), x.stride(1), SIZE=size, TOKENS=_TOKENS)


def gather(cache: Tensor, pages: Tensor, out: Tensor) -> None:
    """Writes the codes of a sequence's first tokens, which lie in pages of a cache, into ``out``.

    Args:
        cache: keys or values ``[pages, page_size, heads, size]``, the last dimension contiguous.
        pages: ``[pages of the sequence]`` int32, the row of the block table.
        out: E4M3 ``[tokens, heads, size]``, contiguous.
    """
    tokens, heads, size = out.shape
    grid = (triton.cdiv(tokens, _TOKENS), heads)
    gather_kernel[grid](
        cache,
        pages,
        out,
        tokens,
        heads,
        cache.shape[1],
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        SIZE=size,
        TOKENS=_TOKENS,
    )
