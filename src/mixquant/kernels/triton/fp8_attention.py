# mypy: allow-untyped-defs, allow-incomplete-defs
"""What FP8 attention needs around its product, in Triton: codes, the values' means, and the merge.

Queries, and keys and values out of a paged cache, become E4M3 codes. Codes have no scale: E4M3 is a
floating-point format, whose relative error is the same over four orders of magnitude. What exceeds its
largest number becomes that. What the steps are for, `mixquant.engines.vllm.attention.fp8` says.

Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped]
import triton.language as tl  # type: ignore[import-not-found, import-untyped]
from torch import Tensor

from mixquant.kernels.triton.launching import launch

E4M3_MAX = tl.constexpr(448.0)
SPANS = 64
"""Into so many parts a segment's keys are divided, each for one program."""
_ROTATED = 128  # elements that a Hadamard matrix mixes, at the most: one of 256 fills shared memory
_TOKENS = 64  # at a time
_TIMES = 8  # to make a Hadamard matrix takes as long as to multiply some tokens with it


@triton.jit
def _hadamard(SIZE: tl.constexpr):
    """Sylvester's Hadamard matrix ``[SIZE, SIZE]``, not normalized: the signs are exact in BF16."""
    i = tl.arange(0, SIZE)
    odd = i[:, None] & i[None, :]
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return (1.0 - 2.0 * odd).to(tl.bfloat16)


@triton.jit
def _rotated(x, signs, TOKENS: tl.constexpr, SIZE: tl.constexpr, ROTATED: tl.constexpr):
    """``[TOKENS, SIZE]`` times the matrix over the root of its size, in FP32, block by block."""
    rows: tl.constexpr = TOKENS * (SIZE // ROTATED)
    product = tl.dot(tl.reshape(x, (rows, ROTATED)), signs)
    return tl.reshape(product * (1.0 / ROTATED**0.5), (TOKENS, SIZE))


@triton.jit
def _codes(x):
    x = tl.minimum(tl.maximum(x, -E4M3_MAX, tl.PropagateNan.ALL), E4M3_MAX, tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


@triton.jit
def _in_cache(pages, row, token, there, head, page_size, stride_row, stride_p, stride_t, stride_h):
    """Where a head of a sequence's tokens begins in a paged cache; ``row`` of the block table."""
    page = tl.load(pages + row * stride_row + token // page_size, there, 0).to(tl.int64)
    return page * stride_p + (token % page_size) * stride_t + head * stride_h


# Not compiled anew for a number of tokens, or a table's width, that happens to be a multiple of 16.
@triton.jit(do_not_specialize=["tokens", "stride_row"])
def encode_queries_kernel(
    x,
    keys,
    pages,
    sequences,
    out,
    weights,
    lse,
    scale,
    tokens,
    heads,
    kv_heads,
    page_size,
    stride_x,
    stride_row,
    stride_p,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    TOKENS: tl.constexpr,
    TIMES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """See `encode_queries`; one program for some rows of one head of one sequence."""
    sequence = sequences + tl.program_id(2) * 4
    table = tl.load(sequence).to(tl.int64)
    first_row = tl.load(sequence + 1)
    rows = tl.load(sequence + 2)
    until = tl.load(sequence + 3)
    head = tl.program_id(0)
    column = tl.arange(0, SIZE)
    key = tl.arange(0, PRECISE)
    kv_head = head // (heads // kv_heads)
    seen = key < until - rows
    begin = _in_cache(
        pages, table, key, seen, kv_head, page_size, stride_row, stride_p, stride_t, stride_h
    )
    first_keys = tl.trans(tl.load(keys + begin[:, None] + column[None, :], seen[:, None], 0.0))
    signs = _hadamard(ROTATED)
    for time in range(TIMES):
        row = (tl.program_id(1) * TIMES + time) * TOKENS + tl.arange(0, TOKENS)
        there = row < rows
        wide = (first_row + row).to(tl.int64)
        at = wide[:, None] * stride_x + head * SIZE + column[None, :]
        found = tl.load(x + at, there[:, None], 0.0)
        codes = _codes(_rotated(found, signs, TOKENS, SIZE, ROTATED))
        to = (wide[:, None] * heads + head) * SIZE + column[None, :]
        tl.store(out + to, codes, there[:, None])

        scores = tl.dot(found, first_keys) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        largest = tl.maximum(tl.max(scores, 1), -1e30)  # finite where no key is seen
        scores = tl.exp(scores - largest[:, None])
        total = tl.sum(scores, 1)
        to = (wide[:, None] * heads + head) * PRECISE + key[None, :]
        share = scores / tl.maximum(total, 1e-30)[:, None]
        tl.store(weights + to, share.to(tl.bfloat16), there[:, None])
        tl.store(lse + head * tokens + wide, largest + tl.log(total), there)


@triton.jit
def _span(segments, number, SPANS: tl.constexpr, TOKENS: tl.constexpr):
    """This program's share of a segment: the segment's numbers, and which of its places."""
    segment = segments + number * 5
    row = tl.load(segment).to(tl.int64)
    first = tl.load(segment + 1)
    count = tl.load(segment + 2)
    length = tl.cdiv(tl.cdiv(count, SPANS), TOKENS) * TOKENS
    start = tl.program_id(1) * length
    return row, first, count, start, tl.minimum(start + length, count)


@triton.jit
def _key_at(place, count, stride, UNIT: tl.constexpr):
    """Which of a segment's keys has its codes at this place: whole units take turns by the stride."""
    units = tl.maximum(count // UNIT, 1)
    unit = place // UNIT
    moved = (unit.to(tl.int64) * stride % units).to(tl.int32)
    return tl.where(unit < units, moved, unit) * UNIT + place % UNIT


# Programs beside each other take the heads of the same tokens, which lie beside each other. The next
# tokens' pages are looked up before these tokens' data is waited for.
@triton.jit(do_not_specialize=["stride_row"])
def value_sums_kernel(
    values,
    pages,
    segments,
    sums,
    heads,
    page_size,
    stride_row,
    stride_p,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """See `value_sums`; one program for a span of one segment of one head."""
    head = tl.program_id(0)
    number = tl.program_id(2)
    row, first, _, start, stop = _span(segments, number, SPANS, TOKENS)
    column = tl.arange(0, SIZE)
    place = start + tl.arange(0, TOKENS)
    begin = _in_cache(
        pages,
        row,
        first + place,
        place < stop,
        head,
        page_size,
        stride_row,
        stride_p,
        stride_t,
        stride_h,
    )
    total = tl.zeros((SIZE,), tl.float32)
    for _ in range(start, stop, TOKENS):
        found = tl.load(values + begin[:, None] + column[None, :], (place < stop)[:, None], 0.0)
        place += TOKENS
        begin = _in_cache(
            pages,
            row,
            first + place,
            place < stop,
            head,
            page_size,
            stride_row,
            stride_p,
            stride_t,
            stride_h,
        )
        total += tl.sum(found.to(tl.float32), 0)
    to = (number * SPANS + tl.program_id(1)) * heads + head
    tl.store(sums + to * SIZE + column, total)


@triton.jit(do_not_specialize=["stride_row"])
def encode_cache_kernel(
    keys,
    values,
    pages,
    segments,
    sums,
    k,
    v,
    lost,
    heads,
    page_size,
    stride_row,
    stride_p,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """See `encode_cache`; one program for a span of one segment of one head."""
    head = tl.program_id(0)
    number = tl.program_id(2)
    row, first, count, start, stop = _span(segments, number, SPANS, TOKENS)
    offset = tl.load(segments + number * 5 + 3)
    stride = tl.load(segments + number * 5 + 4)
    column = tl.arange(0, SIZE)
    place = start + tl.arange(0, TOKENS)
    begin = _in_cache(
        pages,
        row,
        first + _key_at(place, count, stride, UNIT),
        place < stop,
        head,
        page_size,
        stride_row,
        stride_p,
        stride_t,
        stride_h,
    )
    signs = _hadamard(ROTATED)
    spans = (number * SPANS + tl.arange(0, SPANS)) * heads + head
    of_spans = tl.load(sums + spans[:, None] * SIZE + column[None, :])
    mean = tl.sum(of_spans, 0) / tl.maximum(count, 1)
    total = tl.zeros((SIZE,), tl.float32)
    for _ in range(start, stop, TOKENS):
        there = (place < stop)[:, None]
        key = tl.load(keys + begin[:, None] + column[None, :], there, 0.0)
        value = tl.load(values + begin[:, None] + column[None, :], there, 0.0).to(tl.float32)
        to = ((offset + place).to(tl.int64)[:, None] * heads + head) * SIZE + column[None, :]
        place += TOKENS
        begin = _in_cache(
            pages,
            row,
            first + _key_at(place, count, stride, UNIT),
            place < stop,
            head,
            page_size,
            stride_row,
            stride_p,
            stride_t,
            stride_h,
        )
        tl.store(k + to, _codes(_rotated(key, signs, TOKENS, SIZE, ROTATED)), there)
        codes = _codes(value - mean[None, :])
        tl.store(v + to, codes, there)
        total += tl.sum(tl.where(there, value - codes.to(tl.float32), 0.0), 0)
    to_lost = (number * SPANS + tl.program_id(1)) * heads + head
    tl.store(lost + to_lost * SIZE + column, total)


@triton.jit(do_not_specialize=["tokens", "parts", "stride_row"])
def merge_kernel(
    values,
    pages,
    sequences,
    weights,
    first_lse,
    segments,
    lost,
    partial,
    lse,
    out,
    tokens,
    parts,
    heads,
    kv_heads,
    page_size,
    stride_row,
    stride_p,
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """See `merge`; one program for some rows of one head of one sequence."""
    number = tl.program_id(2)
    count = tl.num_programs(2)
    sequence = sequences + number * 4
    table = tl.load(sequence).to(tl.int64)
    first_row = tl.load(sequence + 1)
    rows = tl.load(sequence + 2)
    until = tl.load(sequence + 3)
    head = tl.program_id(0)
    kv_head = head // (heads // kv_heads)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = row < rows
    wide = (first_row + row).to(tl.int64)
    column = tl.arange(0, SIZE)

    first = tl.load(first_lse + head * tokens + wide, there, 0.0)
    largest = first
    lse_at = lse + head * tokens + wide
    for _ in range(parts):
        largest = tl.maximum(largest, tl.load(lse_at, there, float("-inf")))
        lse_at += heads * tokens

    key = tl.arange(0, PRECISE)
    seen = key < until - rows
    begin = _in_cache(
        pages, table, key, seen, kv_head, page_size, stride_row, stride_p, stride_t, stride_h
    )
    first_values = tl.load(values + begin[:, None] + column[None, :], seen[:, None], 0.0)
    at = (wide[:, None] * heads + head) * PRECISE + key[None, :]
    first_weights = tl.load(weights + at, there[:, None], 0.0)
    total = tl.exp(first - largest)
    result = tl.dot(first_weights, first_values) * total[:, None]

    lse_at = lse + head * tokens + wide
    at = (wide[:, None] * heads + head) * SIZE + column[None, :]
    found_at = partial + at
    keys_at = segments + number * 5 + 2
    lost_at = lost + (number * kv_heads + kv_head) * SIZE + column
    for _ in range(parts):
        weight = tl.exp(tl.load(lse_at, there, float("-inf")) - largest)
        found = tl.load(found_at, there[:, None], 0.0).to(tl.float32)
        found += (tl.load(lost_at) / tl.maximum(tl.load(keys_at), 1))[None, :]
        # A row that sees none of a segment's keys has no sum there either.
        result += tl.where((weight > 0)[:, None], weight[:, None] * found, 0.0)
        total += weight
        lse_at += heads * tokens
        found_at += heads * tokens * SIZE
        keys_at += count * 5
        lost_at += count * kv_heads * SIZE
    tl.store(out + at, (result / total[:, None]).to(tl.bfloat16), there[:, None])


def encode_queries(
    x: Tensor,
    keys: Tensor,
    pages: Tensor,
    sequences: Tensor,
    max_rows: int,
    scale: float,
    out: Tensor,
    precise_keys: int,
) -> tuple[Tensor, Tensor]:
    """Writes the codes of rotated queries, and attends to the first keys of their prompts in BF16.

    Of the first keys, only those that stand before a sequence's rows count.

    Args:
        x: ``[tokens, heads, size]`` BF16, each token's heads contiguous, the size a power of two from 64
            on.
        keys: ``[pages, page_size, kv_heads, size]`` BF16, the last dimension contiguous.
        pages: ``[sequences of the pass, pages of each]`` int32, the block table.
        sequences: ``[sequences, 4]`` int32: the row of the block table, the first row in ``x``, how many
            rows, and how many keys up to the last of them.
        max_rows: of a sequence.
        scale: what scores are multiplied with.
        out: E4M3 of the shape of ``x``, contiguous.
        precise_keys: how many first keys: a power of two from 16 on.

    Returns:
        Their softmax's weights, ``[tokens, heads, precise_keys]`` BF16, and the natural logarithms of
        its sums, ``[heads, tokens]`` FP32; 0 and -inf where there are none.
    """
    tokens, heads, size = x.shape
    kv_heads = keys.shape[2]
    weights = x.new_empty(tokens, heads, precise_keys)
    lse = x.new_empty(heads, tokens, dtype=torch.float32)
    numbers = (heads, kv_heads, keys.shape[1], x.stride(0), pages.stride(0), *keys.stride()[:3])
    launch(
        encode_queries_kernel,
        # Programs beside each other read and write beside each other.
        (heads, -(-max_rows // (_TOKENS * _TIMES)), len(sequences)),
        (x, keys, pages, sequences, out, weights, lse),
        (scale, tokens, *numbers),
        {
            "SIZE": size,
            "ROTATED": min(size, _ROTATED),
            "TOKENS": _TOKENS,
            "TIMES": _TIMES,
            "PRECISE": precise_keys,
        },
        ("encode queries", x.device, size, precise_keys, *numbers),
    )
    return weights, lse


def value_sums(values: Tensor, pages: Tensor, segments: Tensor) -> Tensor:
    """The sums of values over each span of each segment's keys: ``[segments, SPANS, heads, size]`` FP32.

    Args:
        values: ``[pages, page_size, heads, size]`` BF16, the last dimension contiguous.
        pages: ``[sequences, pages of each]`` int32, the block table.
        segments: ``[segments, 5]`` int32: the row of the block table, the first key, how many, where the
            segment's codes begin, and the stride by which units of keys take turns there; 1 leaves them
            in order. It has no divisor in common with the number of whole units.
    """
    count, (heads, size) = len(segments), values.shape[2:]
    sums = values.new_empty(count, SPANS, heads, size, dtype=torch.float32)
    strides = values.stride()[:3]
    launch(
        value_sums_kernel,
        (heads, SPANS, count),
        (values, pages, segments, sums),
        (heads, values.shape[1], pages.stride(0), *strides),
        {"SIZE": size, "TOKENS": _TOKENS, "SPANS": SPANS},
        ("value sums", values.device, heads, size, values.shape[1], pages.stride(0), *strides),
    )
    return sums


def encode_cache(
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    segments: Tensor,
    sums: Tensor,
    k: Tensor,
    v: Tensor,
    unit: int,
) -> Tensor:
    """Writes the codes of rotated keys, and of values less their segment's mean.

    Args:
        keys, values: ``[pages, page_size, heads, size]`` BF16, of the same strides.
        pages, segments: as for `value_sums`. A segment may have no keys.
        sums: what `value_sums` returned.
        k, v: E4M3 ``[all segments' keys, heads, size]``, contiguous.
        unit: how many consecutive keys stay together.

    Returns:
        The sums over each segment's keys of the values less their codes, ``[segments, heads, size]``
        FP32.
    """
    count, (heads, size) = len(segments), keys.shape[2:]
    lost = torch.empty(count, SPANS, heads, size, dtype=torch.float32, device=keys.device)
    strides = keys.stride()[:3]
    launch(
        encode_cache_kernel,
        (heads, SPANS, count),
        (keys, values, pages, segments, sums, k, v, lost),
        (heads, keys.shape[1], pages.stride(0), *strides),
        {
            "SIZE": size,
            "ROTATED": min(size, _ROTATED),
            "TOKENS": _TOKENS,
            "SPANS": SPANS,
            "UNIT": unit,
        },
        ("encode cache", keys.device, heads, size, keys.shape[1], pages.stride(0), *strides),
    )
    return lost.sum(1)


def merge(
    values: Tensor,
    pages: Tensor,
    sequences: Tensor,
    max_rows: int,
    weights: Tensor,
    first_lse: Tensor,
    segments: Tensor,
    lost: Tensor,
    partial: Tensor,
    lse: Tensor,
    out: Tensor,
) -> None:
    """Joins the attention to a prompt's first keys and to the segments of each part.

    Args:
        values, pages, sequences, max_rows: as for `encode_queries` and `encode_cache`.
        weights, first_lse: what `encode_queries` returned.
        segments: of each part, those of all sequences.
        lost: what `encode_cache` returned.
        partial: ``[parts, tokens, heads, size]`` BF16, contiguous: attention of codes to the segments of
            each part.
        lse: ``[parts, heads, tokens]`` FP32: the natural logarithm of its softmax's sum; -inf where a
            row sees no key.
        out: ``[tokens, heads, size]`` BF16, contiguous; may be ``partial``, if that has one part.
    """
    parts, tokens, heads, size = partial.shape
    precise_keys = weights.shape[-1]
    strides = values.stride()[:3]
    numbers = (heads, values.shape[2], values.shape[1], pages.stride(0), *strides)
    launch(
        merge_kernel,
        (heads, -(-max_rows // _TOKENS), len(sequences)),
        (values, pages, sequences, weights, first_lse, segments, lost, partial, lse, out),
        (tokens, parts, *numbers),
        {"SIZE": size, "TOKENS": _TOKENS, "PRECISE": precise_keys},
        ("merge", values.device, size, precise_keys, *numbers),
    )
