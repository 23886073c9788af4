"""The search: against every choice there is, and what holds for any sensitivities."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.core.recipe import FormatName
from mixquant.tune.choice import Choice
from mixquant.tune.cost import CostModel
from mixquant.tune.search import FrontierPoint, Predictor, by_bits, by_time, thinned
from mixquant.tune.targets import NOMINAL, Target
from mixquant.tune.units import Unit, Units

BLACKWELL = Target("blackwell", ("nvfp4", "fp8"), NOMINAL)
FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8", "bf16")
BORDERS = (0, 4, 96, 112, 127, 128)
VARIANTS = (("nvfp4", "4/6"), ("fp8", "6"))
HEADS, TAILS = (0, 4), (1, 16, 32)


def predictor(seed: int, units: int) -> Predictor:
    random = np.random.default_rng(seed)
    size = random.lognormal(sigma=1.5, size=(1, units, 1, len(BORDERS) - 1))
    draws = random.normal(size=(16, units, 2, len(BORDERS) - 1)) * size
    draws[:, :, 1] *= random.uniform(0.05, 1.2)  # FP8 is not always nearer
    return Predictor(draws.astype(np.float32), VARIANTS, BORDERS)


def cost_model(seed: int, units: int, tokens: int = 4096) -> CostModel:
    work = np.random.default_rng(seed).integers(1, 2000, size=units)
    made = (
        Unit(f"model.layers.{n}.mlp.up_proj", "", (0, 1), int(one)) for n, one in enumerate(work)
    )
    return CostModel(Units(tuple(made), 7), BLACKWELL, tokens)


def every_choice(units: int) -> list[Choice]:
    return [
        Choice(formats, "4/6", head, tail)
        for formats in product(FORMATS, repeat=units)
        for head in HEADS
        for tail in TAILS
    ]


@given(st.integers(0, 10**6))
def test_no_choice_beats_the_frontier(seed: int) -> None:
    """Between neighbours of a hull there may be one as cheap, never below the line that joins them."""
    model, cost = predictor(seed, 4), cost_model(seed, 4)
    frontier = by_time(model, cost, "4/6", HEADS, TAILS)
    for choice in every_choice(4):
        time, kl = cost.time(choice), model.kl(choice)
        assert not any(
            time < point.time - 1e-12 and kl < point.predicted - 1e-9 for point in frontier[-1:]
        )
        line = np.interp(time, *lower_hull([(p.time, p.predicted) for p in frontier]))
        assert kl >= line * (1 - 1e-6) - 1e-9 or time < frontier[0].time + 1e-12


def lower_hull(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_what_holds_for_every_frontier(seed: int, units: int) -> None:
    model, cost = predictor(seed, units), cost_model(seed, units)
    for frontier in (by_time(model, cost, "4/6", HEADS, TAILS), by_bits(model, cost, "4/6", 4, 1)):
        assert frontier
        for point in frontier:
            assert point.time == pytest.approx(cost.time(point.choice))
            assert point.bits == pytest.approx(cost.bits(point.choice))
            assert point.predicted == pytest.approx(model.kl(point.choice))
        predicted = [point.predicted for point in frontier]
        assert predicted == sorted(predicted, reverse=True) and len(set(predicted)) == len(
            predicted
        )
        assert predicted[-1] == 0  # nothing is quantized
    times = [point.time for point in by_time(model, cost, "4/6", HEADS, TAILS)]
    bits = [point.bits for point in by_bits(model, cost, "4/6", 4, 1)]
    assert times == sorted(times) and bits == sorted(bits)


def test_a_precise_row_has_no_error() -> None:
    model = predictor(0, 3)
    wide = model.by_unit(("nvfp4",), "4/6", 0, 1)
    by_hand = np.square(model.draws[:, :, 0, :4].sum(axis=-1, dtype=np.float64)).mean(axis=0)
    assert np.allclose(wide[:, 0], by_hand)
    narrow = model.by_unit(("nvfp4", "bf16"), "4/6", 4, 32)
    by_hand = np.square(model.draws[:, :, 0, 1].astype(np.float64)).mean(axis=0)
    assert np.allclose(narrow[:, 0], by_hand) and not narrow[:, 1].any()
    with pytest.raises(ValueError, match="no positions were told apart at 0 or at 125"):
        model.by_unit(("nvfp4",), "4/6", 0, 3)


def test_one_of_two_formats_of_one_rate() -> None:
    """Hopper multiplies FP8 and INT8 alike; each unit takes the nearer."""
    random = np.random.default_rng(0)
    draws = random.normal(size=(16, 6, 2, 5)).astype(np.float32)
    model = Predictor(draws, (("fp8", "6"), ("int8", "6")), BORDERS)
    cost = CostModel(cost_model(0, 6).units, Target("hopper", ("fp8", "int8"), NOMINAL), 4096)
    first = by_time(model, cost, "6", (0,), (1,))[0]
    added = model.by_unit(("fp8", "int8"), "6", 0, 1)
    assert first.choice.formats == tuple(("fp8", "int8")[one] for one in added.argmin(axis=1))


def test_thinned() -> None:
    nothing = Choice((), "6", 0, 1)
    many = [
        FrontierPoint(nothing, 1 + n / 100, 4.5, kl) for n, kl in enumerate(np.linspace(1, 0, 5000))
    ]
    few = thinned(many)
    assert len(few) == 200 and few[0] == many[0] and few[-1] == many[-1]
