"""The rule: which rows of a forward pass are quantized, and the plan in force while it runs.

A row is quantized if and only if all of this holds:

1. it is a prompt token: its position lies below the prompt length given at submission;
2. it is neither among the first ``precise_head`` tokens of its prompt nor among the last
   ``precise_tail``;
3. its pass holds at least ``min_prefill_tokens`` rows that 1 and 2 allow;
4. its pass does not replay a CUDA graph that was captured precise.

Everything else is precise, and so is any product whose row count is not the plan's, and any pass
without a plan. Padding rows carry no token: they count toward nothing, and nobody reads their
products, so they are in neither group.

Engines say where each sequence stands; they never decide about a row themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Range = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Thresholds:
    """The numbers of the rule, all in tokens."""

    min_prefill_tokens: int = 0
    precise_head: int = 0
    precise_tail: int = 1


@dataclass(frozen=True)
class PhasePlan:
    """For one forward pass: which rows are quantized and which are precise.

    ``quantized`` and ``precise`` are ranges ``(start, stop)`` of row numbers: ascending, disjoint,
    none empty, no two adjacent. Rows in neither are padding.

    The other fields hold what is derived from the plan once and read by many layers. Each has one
    owner, the only module that reads and writes it.

    Attributes:
        index: row numbers, int64, by group of rows and device. Owner: `mixquant.core.rows`.
        encoded: an activation, its version, and its quantized rows, by format, kernel and options.
            Owner: `mixquant.core.rows`.
    """

    rows: int
    quantized: tuple[Range, ...]
    precise: tuple[Range, ...]
    index: dict[tuple[str, torch.device], torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )
    encoded: dict[Hashable, tuple[torch.Tensor, int, Any]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _derived: dict[type, object] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def derived(self, kind: type[T], make: Callable[[PhasePlan], T]) -> T:
        """What an engine's layers derive from the plan: one object of a type, made when first asked for.

        The owner of a type is the only module that asks for it.
        """
        if kind not in self._derived:
            self._derived[kind] = make(self)
        found = self._derived[kind]
        assert isinstance(found, kind)
        return found

    @property
    def quantized_rows(self) -> int:
        return sum(stop - start for start, stop in self.quantized)

    @property
    def precise_rows(self) -> int:
        return sum(stop - start for start, stop in self.precise)


def plan_pass(
    thresholds: Thresholds,
    first_positions: Sequence[int] | np.ndarray,
    row_counts: Sequence[int] | np.ndarray,
    prompt_lengths: Sequence[int] | np.ndarray,
    *,
    may_replay_graph: bool = False,
) -> PhasePlan:
    """Applies the rule to one forward pass.

    The rows of the pass are those of its sequences, one after the other; within a sequence they
    are consecutive tokens.

    Args:
        first_positions: ``[sequences]``, the position of each sequence's first row. Negative where
            the sequence begins with padding: the row at position 0 is its first token.
        row_counts: ``[sequences]``, how many rows each sequence has in this pass.
        prompt_lengths: ``[sequences]``, in tokens, padding left out, as given at submission.
        may_replay_graph: the pass may replay a CUDA graph that was captured precise.

    Raises:
        ValueError: the three do not have the same length, or a count or length is negative.
    """
    first = np.asarray(first_positions, dtype=np.int64)
    count = np.asarray(row_counts, dtype=np.int64)
    prompt = np.asarray(prompt_lengths, dtype=np.int64)
    if not first.shape == count.shape == prompt.shape or first.ndim != 1:
        raise ValueError(
            "first_positions, row_counts and prompt_lengths need one entry per sequence, got "
            f"{first.shape}, {count.shape} and {prompt.shape}"
        )
    if (count < 0).any() or (prompt < 0).any():
        raise ValueError("row_counts and prompt_lengths cannot be negative")

    row_stop = np.cumsum(count)
    row_start = row_stop - count
    rows = int(row_stop[-1]) if len(row_stop) else 0
    token_start = np.minimum(row_start + np.maximum(-first, 0), row_stop)

    # A sequence's rows in ascending position: [padding | head | quantizable | tail | generated].
    low = np.clip(row_start + thresholds.precise_head - first, token_start, row_stop)
    high = np.clip(row_start + prompt - thresholds.precise_tail - first, low, row_stop)
    if may_replay_graph or int((high - low).sum()) < thresholds.min_prefill_tokens:
        high = low
    quantized = _merged(zip(low, high, strict=True))
    precise = _merged(
        piece
        for start, a, b, stop in zip(token_start, low, high, row_stop, strict=True)
        for piece in ((start, a), (b, stop))
    )
    return PhasePlan(rows, quantized, precise)


def everything_quantized(rows: int) -> PhasePlan:
    """The plan of the arm that quantizes both phases, which mixquant is compared with."""
    return PhasePlan(rows, ((0, rows),) if rows else (), ())


def _merged(ranges: Any) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, stop in ranges:
        if start >= stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], int(stop))
        else:
            merged.append((int(start), int(stop)))
    return tuple(merged)


_in_force: ContextVar[PhasePlan | None] = ContextVar("mixquant_phase_plan", default=None)


def plan_in_force() -> PhasePlan | None:
    """The plan of the forward pass that is running, or None: then every row is precise."""
    return _in_force.get()


class in_force:
    """Puts a plan in force for the forward pass inside the block.

    A class, because torch.compile does not trace generators that set context variables.

    Raises:
        RuntimeError: a plan is in force already. The rows of one pass would follow another's plan.
    """

    def __init__(self, plan: PhasePlan | None) -> None:
        self.plan = plan

    def __enter__(self) -> None:
        if self.plan is not None and _in_force.get() is not None:
            raise RuntimeError("a forward pass with a plan begins inside another one")
        self.token = _in_force.set(self.plan)

    def __exit__(self, *exception: object) -> None:
        _in_force.reset(self.token)
