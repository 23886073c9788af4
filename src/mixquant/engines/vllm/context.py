"""What belongs to the forward pass that runs: its sequences, and what layers derive from its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mixquant.core.phase import PhasePlan, Range
from mixquant.engines.vllm.attention.bf16_rows import Bf16Rows
from mixquant.engines.vllm.attention.fp8 import Run, Shape
from mixquant.engines.vllm.attention.rows import AttentionPiece
from mixquant.engines.vllm.linear.route import Route


@dataclass(frozen=True)
class Batch:
    """The sequences of one pass, in row order; arrays ``[sequences]``, in tokens."""

    requests: list[str]
    first_positions: np.ndarray
    row_counts: np.ndarray
    prompt_lengths: np.ndarray


@dataclass
class PassState:
    """What is derived from one plan. Each field has one owner, which reads and writes it.

    Attributes:
        batch: the sequences, or None in a dummy pass. Owner: `follower`; attention reads it.
        block: rows that are multiplied with the copy in one product, or None where quantized rows are
            gathered. Owner: `linear.operator`.
        route: how rows go through FP8 layers. Owner: `linear.fp8_layer`.
        plain, pieces, runs, bf16_rows: what attends in FP8, by the layers' shape and by the metadata of
            their cache. Owner: `attention.layers`.
    """

    block: Range | None
    batch: Batch | None = None
    route: Route | None = None
    plain: dict[int, bool] = field(default_factory=dict)
    pieces: dict[Shape, list[AttentionPiece]] = field(default_factory=dict)
    runs: dict[Shape, list[Run]] = field(default_factory=dict)
    bf16_rows: dict[tuple[Shape, int], Bf16Rows | None] = field(default_factory=dict)


def state_of(plan: PhasePlan) -> PassState:
    """The state that belongs to a plan, made when it is first asked for."""
    return plan.derived(PassState, lambda plan: PassState(_block_of(plan)))


def _block_of(plan: PhasePlan) -> Range | None:
    """A range that holds all quantized rows of a plan that has some, and few others.

    All of it is multiplied with the copy, and the others again as they should be: cheaper than
    gathering the quantized ones. None if the others are too many.
    """
    if not plan.quantized:
        return None
    first, last = plan.quantized[0][0], plan.quantized[-1][1]
    most = plan.quantized_rows / 0.9
    padded = plan.quantized_rows + plan.precise_rows < plan.rows
    block = (0, plan.rows) if most >= plan.rows and not padded else (first, last)
    return block if most >= block[1] - block[0] else None
