"""The frontier: for each cost the choice with the least predicted divergence.

The predicted divergence of a choice is the sum over its units, so for given head and tail the search is
a knapsack with one option to take for each unit. Along the lower convex hull of each unit's options, the
steps of all units in the order of divergence saved by cost added give choices that are optimal for their
cost: no other choice costs as little and is predicted nearer. Each head is tried with each tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mixquant.core.recipe import FormatName
from mixquant.tune.choice import BlockScale, Choice
from mixquant.tune.cost import CostModel
from mixquant.tune.sensitivity import Variant

POINTS = 200  # of a frontier, at most


@dataclass(frozen=True)
class Predictor:
    """Predicts the divergence of choices from the products of `sensitivity.draw`.

    Attributes:
        draws: ``[draws, units, variants, groups]``.
        variants: what the third axis is.
        borders: of the groups of positions, the last one the prompt's end.
    """

    draws: np.ndarray
    variants: tuple[Variant, ...]
    borders: tuple[int, ...]

    def by_unit(
        self, formats: Sequence[FormatName], block_scale: BlockScale, head: int, tail: int
    ) -> np.ndarray:
        """``[units, formats]`` FP64: what each unit adds in each format, in nats per answer token.

        Raises:
            ValueError: a head or tail that no group of positions begins or ends with.
        """
        first, last = head, self.borders[-1] - tail
        if first not in self.borders or last not in self.borders or first > last:
            raise ValueError(f"no positions were told apart at {first} or at {last}")
        groups = slice(self.borders.index(first), self.borders.index(last))
        added = np.zeros((self.draws.shape[1], len(formats)))
        for index, fmt in enumerate(formats):
            if fmt == "bf16":
                continue
            variant = self.variants.index((fmt, block_scale if fmt == "nvfp4" else "6"))
            products = self.draws[:, :, variant, groups].sum(axis=-1, dtype=np.float64)
            added[:, index] = np.square(products).mean(axis=0)
        return added

    def kl(self, choice: Choice) -> float:
        """The predicted divergence of a choice, in nats per answer token."""
        formats = tuple(dict.fromkeys(choice.formats))
        added = self.by_unit(formats, choice.block_scale, choice.precise_head, choice.precise_tail)
        index = [formats.index(fmt) for fmt in choice.formats]
        return float(added[np.arange(len(index)), index].sum())


@dataclass(frozen=True)
class FrontierPoint:
    """A choice with what it costs.

    ``time`` is relative to plain. ``bits`` is the mean over multiplied weights. ``predicted`` is a KL in
    nats per answer token.
    """

    choice: Choice
    time: float
    bits: float
    predicted: float


def by_time(
    predictor: Predictor,
    cost: CostModel,
    block_scale: BlockScale,
    heads: Sequence[int],
    tails: Sequence[int],
) -> list[FrontierPoint]:
    """The frontier of prefill time: ascending in time, descending in predicted divergence."""
    formats: tuple[FormatName, ...] = (*cost.target.formats, "bf16")
    found: list[FrontierPoint] = []
    for head in heads:
        for tail in tails:
            costs = np.stack([cost.times(fmt, head, tail) for fmt in formats], axis=1)
            added = predictor.by_unit(formats, block_scale, head, tail)
            found += _points(cost, costs, added, formats, block_scale, head, tail)
    return thinned(pareto(found, lambda point: point.time))


def by_bits(
    predictor: Predictor, cost: CostModel, block_scale: BlockScale, head: int, tail: int
) -> list[FrontierPoint]:
    """The frontier of mean bits. Bits do not depend on head and tail, so both are given."""
    formats: tuple[FormatName, ...] = (*cost.target.formats, "bf16")
    costs = np.stack([cost.bits_of(fmt) for fmt in formats], axis=1)
    added = predictor.by_unit(formats, block_scale, head, tail)
    found = _points(cost, costs, added, formats, block_scale, head, tail)
    return thinned(pareto(found, lambda point: point.bits))


def path(costs: np.ndarray, added: np.ndarray) -> Iterator[np.ndarray]:
    """The choices along the convex hulls, the cheapest first.

    Args:
        costs: ``[units, options]``.
        added: ``[units, options]``, of the divergence.

    Yields:
        ``[units]``, the number of each unit's option; another array each time.
    """
    now = np.zeros(len(costs), dtype=np.int64)
    steps: list[tuple[float, int, int, int]] = []
    for unit in range(len(costs)):
        hull = _hull(costs[unit], added[unit])
        now[unit] = hull[0]
        for place, (before, after) in enumerate(pairwise(hull)):
            saved = added[unit, before] - added[unit, after]
            dearer = costs[unit, after] - costs[unit, before]
            steps.append((-saved / dearer, unit, place, after))
    yield now.copy()
    for _, unit, _, after in sorted(steps):
        now[unit] = after
        yield now.copy()


def pareto(
    points: Iterable[FrontierPoint], cost: Callable[[FrontierPoint], float]
) -> list[FrontierPoint]:
    """The points that no other equals or beats in both cost and predicted divergence."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda one: (cost(one), one.predicted)):
        if not best or point.predicted < best[-1].predicted:
            best.append(point)
    return best


def thinned(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """At most `POINTS` points, evenly by number, the ends among them."""
    if len(points) <= POINTS:
        return list(points)
    kept = np.unique(np.linspace(0, len(points) - 1, POINTS).round().astype(int))
    return [points[index] for index in kept]


def _hull(costs: np.ndarray, added: np.ndarray) -> list[int]:
    """The options on the lower left of the convex hull, ascending in cost."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda one: (costs[one], added[one])):
        if hull and added[option] >= added[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(costs, added, hull[-1], option) <= _slope(
            costs, added, hull[-2], hull[-1]
        ):
            hull.pop()
        if hull and costs[option] <= costs[hull[-1]]:
            continue
        hull.append(option)
    return hull


def _slope(costs: np.ndarray, added: np.ndarray, before: int, after: int) -> float:
    return float((added[after] - added[before]) / (costs[after] - costs[before]))


def _points(
    cost: CostModel,
    costs: np.ndarray,
    added: np.ndarray,
    formats: Sequence[FormatName],
    block_scale: BlockScale,
    head: int,
    tail: int,
) -> Iterator[FrontierPoint]:
    rows = np.arange(len(costs))
    for options in path(costs, added):
        choice = Choice(tuple(formats[one] for one in options), block_scale, head, tail)
        predicted = float(added[rows, options].sum())
        yield FrontierPoint(choice, cost.time(choice), cost.bits(choice), predicted)
