"""Which rows of a pass attend in FP8, and in which launches: numbers only, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixquant.core.phase import PhasePlan

PRECISE_KEYS = 16
"""Keys at a prompt's start that are attended to in BF16: as few as a tensor core multiplies by."""

UNIT = 16
"""Consecutive keys that stay together where others are put in another order."""

# Rows of one launch. Longer chunks are cut: the longer a chunk, the further the mean of its values is
# from the mean of the keys that its first rows see.
MAX_ROWS = 8192

# Keys of the sequences in one launch. A longer sequence has a launch of its own.
MAX_KEYS = 32768


@dataclass(frozen=True)
class AttentionPiece:
    """Consecutive rows of one sequence, whose attention is FP8."""

    sequence: int
    start: int  # row of the pass
    stop: int
    keys: int  # of the last of them: its position + 1

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def context(self) -> int:
        """How many keys stand before the piece: all of its rows see them."""
        return self.keys - self.rows

    @property
    def own_in_bf16(self) -> bool:
        """Whether the rows attend in BF16 to each other's keys, and in FP8 to those before only.

        A chunk's first rows see few of its keys, with another mean than that of all. The fewer keys
        stand before the chunk, the more of a row's error is from there.
        """
        return self.context < max(self.rows, PRECISE_KEYS)


def pieces_of(
    plan: PhasePlan, batch: Any, worth: Callable[[int, int], bool]
) -> list[AttentionPiece]:
    """The rows of a pass whose attention is FP8: quantized ones, where that is worth it.

    A prompt's first chunk has no keys before it, and so no codes. All of it attends in BF16 here, the
    precise rows, too: they need no launch of their own then.

    Args:
        batch: with arrays ``first_positions``, ``row_counts`` and ``prompt_lengths``
            ``[sequences]``, in row order.
        worth: of how many consecutive rows, and how many keys up to the last of them.
    """
    pieces = []
    row = 0
    for sequence, (first, count, prompt) in enumerate(
        zip(
            batch.first_positions.tolist(),
            batch.row_counts.tolist(),
            batch.prompt_lengths.tolist(),
            strict=True,
        )
    ):
        for start, stop in plan.quantized:
            # Decode rows are quantized, too, where everything is.
            low, high = max(start, row), min(stop, row + count, row + prompt - first)
            if low >= high or not worth(high - low, first + high - row):
                continue
            if first == 0:
                low, high = row, row + count
            pieces.append(AttentionPiece(sequence, low, high, first + high - row))
            if first == 0:
                break
        row += count
    return pieces


def runs_of(
    pieces: list[AttentionPiece], batch: Any, max_rows: int = MAX_ROWS, max_keys: int = MAX_KEYS
) -> list[tuple[AttentionPiece, ...]]:
    """The pieces of a pass, in order, as runs of consecutive rows of one kind, each for one launch.

    Rows between two pieces (the precise tail of a sequence, the precise head of the next) count to them
    then: they are computed with the others, and again as they should be.
    """
    ends = np.cumsum(batch.row_counts).tolist()
    runs: list[list[AttentionPiece]] = []
    for whole in pieces:
        for piece in _cut(whole, max_rows):
            if runs and runs[-1][-1].sequence == piece.sequence - 1:
                *before, last = runs[-1]
                end = ends[last.sequence]
                last = replace(last, stop=end, keys=last.keys + end - last.stop)
                joined = [*before, last, replace(piece, start=end)]
                alike = len({one.own_in_bf16 for one in joined}) == 1
                if alike and sum(one.keys for one in joined) <= max_keys:
                    runs[-1] = joined
                    continue
            runs.append([piece])
    return [tuple(run) for run in runs]


def _cut(piece: AttentionPiece, max_rows: int) -> list[AttentionPiece]:
    return [
        replace(piece, start=start, stop=stop, keys=piece.keys - (piece.stop - stop))
        for start in range(piece.start, piece.stop, max_rows)
        if (stop := min(start + max_rows, piece.stop))
    ]


@dataclass(frozen=True)
class Segment:
    """Consecutive keys of a sequence whose values have one mean, and the order of their codes."""

    sequence: int
    first: int
    count: int
    stride: int = 1  # between the units of keys whose codes follow each other


def segments_of(piece: AttentionPiece) -> tuple[Segment, Segment]:
    """The keys with codes: of a piece's context less the precise keys, and of its own rows.

    Either may be empty.
    """
    before = max(piece.context - PRECISE_KEYS, 0)
    return (
        Segment(piece.sequence, PRECISE_KEYS, before, stride_of(before // UNIT)),
        Segment(piece.sequence, piece.context, 0 if piece.own_in_bf16 else piece.rows),
    )


def stride_of(units: int) -> int:
    """A stride that visits all units, and any few in a row from all over them: the golden ratio's."""
    stride = max(1, round(units * (5**0.5 - 1) / 2))
    while math.gcd(stride, units) > 1:
        stride += 1
    return stride


def worth(rows: int, keys: int, heads: int, kv_heads: int, size: int) -> bool:
    """Whether a chunk takes less time here than in vLLM's attention.

    FP8 saves time for each pair of a row and a coded key, and a quarter as much for each pair with a
    BF16 key, which is not looked up in pages. Encoding takes time for each key and each row, and
    launches take time. The numbers are an H100's: `benchmarks/attention_crossover.py`.
    """
    piece = AttentionPiece(0, 0, rows, keys)
    own = rows * rows / 2
    if piece.context < PRECISE_KEYS:
        return own > 5e10 / (heads * size)
    coded = piece.context if piece.own_in_bf16 else keys
    saved = rows * piece.context + (own / 4 if piece.own_in_bf16 else own)
    return saved > 1600 * coded * kv_heads / heads + 1500 * rows + 5e10 / (heads * size)
