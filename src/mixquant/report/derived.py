"""Figures that a page adds to those of a file: ratios to the baseline, and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mixquant.results import BASELINE, Measurement

ATTENTION_ARM = "attention"  # the arm of `mixquant compare` that quantizes nothing
_LARGEST_RATIO = 1e9
_NOTICEABLE = 0.02  # a smaller difference does not count as faster or slower
# Workloads that repeat the same requests. Elsewhere lowest and highest are of different requests.
_REPEATED = ("length", "batch")

Condition = tuple[str, int, int, int | None]  # workload, prompt tokens, concurrency, cached tokens


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the baseline an arm was in one measurement."""

    arm: str
    measurement: Measurement  # the arm's
    ratio: float
    low: float | None  # the slowest of the arm against the fastest of the baseline
    high: float | None

    @property
    def sign(self) -> int:
        """1 faster than the baseline, -1 slower, 0 if below 2 % or if the runs overlap."""
        repeated = self.measurement.workload in _REPEATED
        if (
            repeated
            and self.low is not None
            and self.high is not None
            and self.low <= 1 <= self.high
        ):
            return 0
        return sign_of(self.ratio)


def sign_of(ratio: float) -> int:
    """1 for a speed-up, -1 for a loss, 0 for a difference below 2 %."""
    return 0 if abs(ratio - 1) < _NOTICEABLE else 1 if ratio > 1 else -1


def arms_of(names: Iterable[str]) -> tuple[str, ...]:
    """Each once, the baseline first."""
    return tuple(sorted(dict.fromkeys(names), key=lambda name: name != BASELINE))


def higher_is_better(unit: str) -> bool:
    return "/s" in unit


def condition(m: Measurement) -> Condition:
    """What must be alike for two arms to be compared."""
    # A trace has prompts of all lengths. Their mean is a result: answers become prompts.
    return m.workload, 0 if m.workload == "agent" else m.tokens, m.concurrency, m.cached


def unquantized(measurements: Iterable[Measurement]) -> frozenset[tuple[str, Condition]]:
    """The arms and conditions in which no prompt token was quantized, as far as it was counted."""
    return frozenset(
        (m.arm, condition(m))
        for m in measurements
        if m.metric == "quantized" and m.value == 0 and m.arm != BASELINE
    )


def speedups(
    measurements: Iterable[Measurement],
    left_out: frozenset[tuple[str, Condition]] = frozenset(),
) -> tuple[Speedup, ...]:
    """Each measurement of the other arms against the baseline's of the same metric, workload, prompt
    length and concurrency; above 1 the arm is better. What has no counterpart, or is no speed (a
    share), is left out, and so is what would divide by zero.

    Args:
        left_out: arms and conditions that get no ratio, see `unquantized`.
    """
    measurements = tuple(measurements)
    base = {(condition(m), m.metric, m.unit): m for m in measurements if m.arm == BASELINE}
    found = []
    for own in measurements:
        reference = base.get((condition(own), own.metric, own.unit))
        if own.arm == BASELINE or reference is None or own.unit == "share":
            continue
        quotient = _ratio(own.value, reference.value, own.unit)
        if quotient is None or (own.arm, condition(own)) in left_out:
            continue
        bounds = sorted(
            bound
            for a, b in ((own.lowest, reference.highest), (own.highest, reference.lowest))
            if a is not None and b is not None and (bound := _ratio(a, b, own.unit)) is not None
        )
        low, high = bounds if len(bounds) == 2 else (None, None)
        found.append(Speedup(own.arm, own, quotient, low, high))
    return tuple(found)


def _ratio(own: float, reference: float, unit: str) -> float | None:
    return ratio(own, reference) if higher_is_better(unit) else ratio(reference, own)


def ratio(above: float, below: float) -> float | None:
    """The quotient, or None if it says nothing: of a figure that is zero, or next to it."""
    return above / below if below > 0 and above / below < _LARGEST_RATIO else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats: at most as high in both coordinates, lower in one.

    Returns:
        Their indices, by the first coordinate. Equal points are all there or all absent.
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
        )

    return sorted(
        (i for i, point in enumerate(points) if not beaten(point)), key=points.__getitem__
    )
