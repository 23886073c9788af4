"""Attention in FP8 over a BF16 cache: queries, keys and values become E4M3 codes as a layer needs them.

FlashAttention-3 (the wheel ``fa3-fwd``) multiplies the codes and writes BF16. By itself that is wrong
where prompts are long, so four things are done around it. In exact arithmetic none changes the result.

*Values less their mean.* Hopper's tensor cores add FP8 products up with some 14 bits. A sum that
drifts one way swallows its own increments: if V has a mean of 0.2 standard deviations, the error is
0.4 at 128k keys. So V's mean, per head and channel, is subtracted in FP32 before V is coded, and added
to the result: softmax's weights sum to one. What is added is the mean of V less its codes, which is
V's mean and what coding lost of it.

*Context and chunk apart, the context in another order.* V's mean may change along a prompt, and then
the sum drifts for as long as the mean stays the same. The order of keys that all rows see does not
matter. So the keys before a chunk are read in an order in which any few in a row come from all over
them, and their mean is subtracted. The chunk's own keys are multiplied apart, and their own mean is
subtracted. The logarithms of the softmax's sums join the two results.

*The chunk's own keys in BF16, where there are more of them than before.* The first rows of a chunk see
few of its keys, whose mean is not that of all. With much context this does not show. Otherwise the chunk
attends to itself in BF16: to its keys and values as the layer computed them, not out of the cache's
pages, which takes about as long as codes do. A prompt's first chunk has no context, and no codes.

*Rotation.* Queries and keys are multiplied by a Hadamard matrix along the head. Scores stay as they
are, and outliers, whose codes err most, are spread (QuaRot, arXiv 2404.00456; FlashAttention-3, arXiv
2407.08608).

*The first keys in BF16.* Probabilities are codes, too, relative to the row's largest: those 12 nats
below it are lost. A prompt's first tokens often are attention sinks, so far above the rest. The kernel
that joins context and chunk attends to them, in BF16.

A later token of the same chunk changes the means, and so how a value is rounded, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.vllm.attention.rows import (
    MAX_KEYS,
    PRECISE_KEYS,
    UNIT,
    AttentionPiece,
    segments_of,
)

HEAD_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention; ``scale`` is what scores are multiplied with."""

    heads: int
    kv_heads: int
    size: int
    scale: float


@dataclass(frozen=True)
class Bounds:
    """Where the sequences of a run begin and end, ``[sequences + 1]`` int32 each."""

    rows: Tensor
    keys: Tensor
    max_rows: int
    max_keys: int


@dataclass(frozen=True)
class Launch:
    """Segments, one of each of a run's sequences, that are multiplied in one launch."""

    codes: slice | None  # of keys; None for BF16
    causal: bool
    bounds: Bounds | None  # None for a single sequence


class Run:
    """Pieces that share their launches, and what the kernels have to know of them."""

    def __init__(self, pieces: tuple[AttentionPiece, ...], device: torch.device) -> None:
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self.has_context = any(piece.context for piece in pieces)
        rows = [piece.rows for piece in pieces]
        self.max_rows = max(rows)
        starts = [piece.start - self.start for piece in pieces]
        self.sequences = integers(
            [
                (piece.sequence, start, count, piece.keys)
                for piece, start, count in zip(pieces, starts, rows, strict=True)
            ],
            device,
        )
        contexts, chunks = zip(*map(segments_of, pieces), strict=True)
        self.launches: list[Launch] = []
        numbers, offset = [], 0
        for part in (contexts, chunks):
            in_bf16 = part is chunks and pieces[0].own_in_bf16
            keys = rows if in_bf16 else [one.count for one in part]
            if not any(keys):
                continue
            bounds = None
            if len(pieces) > 1:
                ends = [integers([0, *accumulate(counts)], device) for counts in (rows, keys)]
                bounds = Bounds(ends[0], ends[1], max(rows), max(keys))
            codes = None if in_bf16 else slice(offset, offset + sum(keys))
            self.launches.append(Launch(codes, part is chunks, bounds))
            for one in part:
                numbers.append((one.sequence, one.first, one.count, offset, one.stride))
                offset += one.count
        self.segments = integers(numbers, device)
        self.keys = offset  # that have codes


@dataclass
class Workspace:
    """Where codes, and what is attended to in segments, are kept for one run of one layer."""

    q: Tensor  # [rows, heads, size] E4M3
    k: Tensor  # [keys, kv_heads, size] E4M3
    v: Tensor
    partial: Tensor | None  # [parts, rows, heads, size] BF16, if there are two

    @classmethod
    def of(cls, shape: Shape, rows: int, keys: int, parts: int, device: torch.device) -> Workspace:
        fp8 = torch.float8_e4m3fn
        q = torch.empty(rows, shape.heads, shape.size, dtype=fp8, device=device)
        k = torch.empty(keys, shape.kv_heads, shape.size, dtype=fp8, device=device)
        partial = None
        if parts > 1:
            partial = torch.empty(parts, *q.shape, dtype=torch.bfloat16, device=device)
        return cls(q, k, torch.empty_like(k), partial)

    @classmethod
    def largest(cls, shape: Shape, rows: int, longest: int, device: torch.device) -> Workspace:
        """What a pass may need at the most.

        Args:
            rows: of the pass.
            longest: a sequence may be, in tokens.
        """
        # A run of several pieces has no more rows than keys.
        return cls.of(shape, min(rows, MAX_KEYS), max(longest, MAX_KEYS), 2, device)


def attend(
    shape: Shape,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    table: Tensor,
    output: Tensor,
) -> None:
    """Writes the attention of a run's rows into ``output``.

    Args:
        query, output: ``[rows of the pass, heads, size]`` BF16, or ``[rows, heads * size]``.
        key, value: ``[rows of the pass, kv_heads, size]`` BF16, or ``[rows, kv_heads * size]``.
        cache: keys and values, ``[pages, page_size, kv_heads, size]`` BF16, of the same strides. It
            holds those of the pass's rows, too.
        table: ``[sequences of the pass, pages of each]`` int32.
    """
    rows = run.stop - run.start
    q, out = (x[run.start : run.stop].view(rows, shape.heads, shape.size) for x in (query, output))
    own = [x[run.start : run.stop].view(1, rows, shape.kv_heads, shape.size) for x in (key, value)]
    if not run.has_context:
        bounds = run.launches[0].bounds
        flash_attention(q[None], own[0], own[1], shape.scale, out[None], bounds=bounds)
        return
    kernels = _kernels()
    keys, values = cache
    work = Workspace.of(shape, rows, run.keys, len(run.launches), query.device)
    of_rows = (table, run.sequences, run.max_rows)
    first = kernels.encode_queries(q, keys, *of_rows, shape.scale, work.q, PRECISE_KEYS)
    sums = kernels.value_sums(values, table, run.segments)
    lost = kernels.encode_cache(keys, values, table, run.segments, sums, work.k, work.v, UNIT)
    partial = out[None] if work.partial is None else work.partial
    logarithms = []
    for number, launch in enumerate(run.launches):
        in_bf16 = launch.codes is None
        lse = flash_attention(
            q[None] if in_bf16 else work.q[None],
            own[0] if in_bf16 else work.k[None, launch.codes],
            own[1] if in_bf16 else work.v[None, launch.codes],
            shape.scale,
            partial[number : number + 1],
            causal=launch.causal,
            bounds=launch.bounds,
        )
        logarithms.append(lse.view(1, shape.heads, rows))
    lse = torch.cat(logarithms) if len(logarithms) > 1 else logarithms[0]
    kernels.merge(values, *of_rows, *first, run.segments, lost, partial, lse, out)


def _kernels() -> Any:
    from mixquant.kernels.triton import fp8_attention  # not before it is needed: it imports Triton

    return fp8_attention


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    out: Tensor,
    causal: bool = True,
    bounds: Bounds | None = None,
) -> Tensor:
    """FlashAttention-3, of E4M3 codes or BF16. If it is causal, the last query stands at the last key.

    Args:
        q: ``[1, rows, heads, size]``.
        k, v: ``[1, keys, kv_heads, size]``.
        out: ``[1, rows, heads, size]`` BF16.
        bounds: of the sequences, if there are several.

    Returns:
        The natural logarithms of the softmax's sums, ``[1, heads, rows]`` FP32, or ``[heads, rows]`` of
        several sequences; -inf for a row that sees no key.
    """
    import fa3_fwd._C  # type: ignore[import-not-found]  # noqa: F401  # registers the operator

    lengths: list[Any] = [None] * 7
    if bounds is not None:
        q, k, v, out = q[0], k[0], v[0], out[0]
        lengths = [bounds.rows, bounds.keys, *[None] * 3, bounds.max_rows, bounds.max_keys]
    _, lse, *_ = torch.ops.fa3_fwd.fwd(
        q,
        k,
        v,
        *[None] * 3,  # new keys and values, qv
        out,
        *lengths,
        *[None] * 3,  # pages, batch indices, padding
        *[None] * 3,  # rotary
        *[None] * 3,  # scales
        softmax_scale,
        causal,
        -1,
        -1,
        0,
        0.0,
        True,
        None,
        1,
        None,
        0,
    )
    return lse  # type: ignore[no-any-return]


def integers(values: list[Any], device: torch.device) -> Tensor:
    """The same as int32 on a device, which is not waited for."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
