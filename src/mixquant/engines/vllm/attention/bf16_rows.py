"""The rows of a pass that do not attend in FP8, as a pass of their own for vLLM's kernel."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.vllm.attention.fp8 import integers
from mixquant.engines.vllm.attention.rows import AttentionPiece


@dataclass
class Bf16Rows:
    """The other rows of a pass, as a pass of their own."""

    rows: Tensor | slice  # [rows] int64, or consecutive ones
    count: int
    metadata: Any


def bf16_rows_of(batch: Any, pieces: list[AttentionPiece], metadata: Any) -> Bf16Rows | None:
    """The rows that are in no piece, as sequences of consecutive rows with metadata of their own."""
    taken = {piece.sequence: [] for piece in pieces}  # type: dict[int, list[AttentionPiece]]
    for piece in pieces:
        taken[piece.sequence].append(piece)
    rows: list[int] = []
    starts, lengths, sequences = [0], [], []
    row = 0
    for sequence, (first, count) in enumerate(
        zip(batch.first_positions.tolist(), batch.row_counts.tolist(), strict=True)
    ):
        at = row
        edges = [(piece.start, piece.stop) for piece in taken.get(sequence, [])]
        for start, stop in [*edges, (row + count, row + count)]:
            if at < start:
                rows.extend(range(at, start))
                starts.append(len(rows))
                lengths.append(first + start - row)
                sequences.append(sequence)
            at = stop
        row += count
    if not rows:
        return None
    device = metadata.block_table.device
    table = torch.tensor(sequences).to(device, non_blocking=True)

    own = copy.copy(metadata)
    own.num_actual_tokens = len(rows)
    own.query_start_loc = integers(starts, device)
    own.seq_lens = integers(lengths, device)
    own.max_query_len = max(b - a for a, b in pairwise(starts))
    own.max_seq_len = max(lengths)
    own.block_table = metadata.block_table.index_select(0, table)
    own.scheduler_metadata = None  # made for the whole pass
    if rows[-1] - rows[0] == len(rows) - 1:
        return Bf16Rows(slice(rows[0], rows[-1] + 1), len(rows), own)
    return Bf16Rows(torch.tensor(rows).to(device, non_blocking=True), len(rows), own)
