"""Which point of the frontier to take, and what the report says of measured and predicted figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixquant.tune.search import FrontierPoint

MEASURED = 8  # candidates, on each kind of texts; more only if none of them is within the budget
CLOSE = 0.005  # in time next to plain: a smaller saving is not worth another measurement


def cheapest_within(
    frontier: Sequence[FrontierPoint],
    limit: float,
    ratios: Mapping[int, float],
    measured: Callable[[int], float],
) -> int:
    """The number of the cheapest point that is measured within a limit.

    Measured and predicted divergences differ by a ratio that changes slowly along the frontier. So this
    measures the cheapest point that the nearest measured ratio puts within the limit. It stops once a
    point is measured within the limit and the next one to measure is that point or saves less than
    `CLOSE`.

    Args:
        frontier: descending in predicted divergence; the last is 0.
        limit: the largest divergence, in nats per answer token.
        ratios: measured over predicted by point, to begin with; from other texts.
        measured: measures a point.
    """
    known: dict[int, float] = {}

    def ratio(index: int) -> float:
        of = known or ratios
        return of[min(of, key=lambda one: abs(one - index))] if of else 1.0

    def within(index: int) -> bool:
        return ratio(index) * frontier[index].predicted <= limit

    while True:
        index = next(filter(within, range(len(frontier))), len(frontier) - 1)
        enough = min(filter(within, known), default=None)
        if enough is not None and (
            len(known) >= MEASURED or frontier[enough].time - frontier[index].time < CLOSE
        ):
            return enough
        divergence = measured(index)
        predicted = frontier[index].predicted
        if not predicted:
            return index  # the last: nothing that reaches the answers is quantized
        known[index] = divergence / predicted


def ratios_of(frontier: Sequence[FrontierPoint], measured: Mapping[int, float]) -> dict[int, float]:
    """Measured over predicted divergence by point, of those measured that predict any."""
    return {
        index: value / frontier[index].predicted
        for index, value in measured.items()
        if frontier[index].predicted
    }


def recovered(kl: float | None, quantized: float) -> float | None:
    """The share of the loss of quantizing both phases that a divergence avoids, where both are known."""
    return None if kl is None or quantized <= 0 else 1 - kl / quantized


def rank(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Spearman's correlation of the pairs that have both."""
    both = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    if len(both) < 3:
        return None
    ranks = both.argsort(axis=0).argsort(axis=0)
    return float(np.asarray(np.corrcoef(ranks.T))[0, 1])
