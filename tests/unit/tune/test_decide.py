"""The decision: which point of a frontier is taken, whatever is measured."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixquant.tune.choice import Choice
from mixquant.tune.decide import cheapest_within
from mixquant.tune.search import FrontierPoint


def points(*predicted: float) -> list[FrontierPoint]:
    nothing = Choice((), "6", 0, 1)
    return [FrontierPoint(nothing, 1 + n / 100, 4.5, kl) for n, kl in enumerate(predicted)]


@given(st.integers(0, 10**6), st.floats(0.001, 3), st.floats(0.2, 5))
def test_the_point_taken_is_within_the_limit(seed: int, limit: float, ratio: float) -> None:
    """Whatever measured divergences are, and the cheapest of them if they fall with the cost."""
    random = np.random.default_rng(seed)
    frontier = points(*np.geomspace(2, 0.001, 60), 0.0)
    true = np.array([point.predicted for point in frontier])
    true[:-1] *= ratio * np.exp(0.4 * np.sin(np.arange(60) / random.uniform(5, 30)))
    asked: list[int] = []

    def measure(index: int) -> float:
        asked.append(index)
        return float(true[index])

    taken = cheapest_within(frontier, limit, {0: 1.0}, measure)
    assert true[taken] <= limit
    assert len(asked) == len(set(asked))


def test_a_budget_that_nothing_quantized_meets() -> None:
    frontier = points(2.0, 1.0, 0.0)
    assert cheapest_within(frontier, 1e-6, {}, lambda index: frontier[index].predicted) == 2
