"""Intervals hold what they promise: coverage by simulation, bounds and symmetry as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import binomtest

from mixquant.evaluate.benchmarks.statistics import difference, item_weights, recovery, score

SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])


def matrices() -> st.SearchStrategy[np.ndarray]:
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=SHARES)).filter(
        lambda scores: not np.isnan(scores).all()
    )


@settings(deadline=None)
@given(matrices())
def test_a_score_is_the_mean_of_the_items_means_and_lies_in_its_interval(
    scores: np.ndarray,
) -> None:
    estimate = score(scores)
    per_item = [np.nanmean(row) for row in scores if not np.isnan(row).all()]
    assert estimate.value == pytest.approx(np.mean(per_item))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


@pytest.mark.parametrize("right", [0, 20])
def test_at_0_and_100_percent_it_is_wilsons_over_items(right: int) -> None:
    scores = np.zeros((20, 4)) + right / 20
    estimate = score(scores)
    wanted = binomtest(right, 20).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((wanted.low, wanted.high))


def test_seeds_that_all_agree_tell_nothing_more() -> None:
    once = np.array([[1.0]] * 30 + [[0.0]] * 20)
    assert score(np.repeat(once, 8, axis=1)) == score(once)


def test_seeds_that_vary_by_chance_tell_more_but_never_more_than_that_many_items() -> None:
    rng = np.random.default_rng(1)
    coins = (rng.random((50, 8)) < 0.5).astype(float)
    width = score(coins).high - score(coins).low
    narrowest = binomtest(200, 400).proportion_ci(method="wilson")
    assert narrowest.high - narrowest.low <= width
    assert width < 0.6 * (score(coins[:, :1]).high - score(coins[:, :1]).low)


@pytest.mark.parametrize(
    "items", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (30, 200))]
)
@pytest.mark.parametrize(
    ("seeds", "alike"),
    [
        (1, 1.0),
        pytest.param(8, 0.0, marks=pytest.mark.slow),
        (8, 0.3),
        pytest.param(8, 0.7, marks=pytest.mark.slow),
    ],
)
def test_score_intervals_cover(items: int, seeds: int, alike: float) -> None:
    """``alike``: the correlation of an item's seeds. 95 % are meant on the average over true scores."""
    rng = np.random.default_rng(items)
    covered = []
    for true in (0.02, 0.1, 0.3, 0.5, 0.8, 0.97):
        hits = 0
        for _ in range(500):
            if alike in (0.0, 1.0):
                chance = np.full(items, true)
            else:
                odds = (1 - alike) / alike
                chance = rng.beta(true * odds, (1 - true) * odds, items)
            answers = rng.binomial(seeds, chance) / seeds
            estimate = score(answers[:, None] * np.ones(seeds))
            hits += estimate.low <= true <= estimate.high
        covered.append(hits / 500)
    assert np.mean(covered) >= 0.93
    assert min(covered) >= 0.85


@settings(deadline=None)
@given(
    matrices().flatmap(
        lambda a: st.tuples(st.just(a), arrays(np.float64, a.shape, elements=SHARES))
    )
)
def test_differences_are_bounded_and_antisymmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pair
    if np.isnan(first - second).all():
        with pytest.raises(ValueError, match="no score"):
            difference(first, second)
        return
    forth, back = difference(first, second), difference(second, first)
    assert forth.value == pytest.approx(-back.value, abs=1e-12)
    assert forth.low == pytest.approx(-back.high, abs=1e-12)
    assert forth.high == pytest.approx(-back.low, abs=1e-12)
    assert -1 <= forth.low <= forth.value <= forth.high <= 1
    assert forth.low < forth.high


def test_a_difference_pairs_items_so_hard_and_easy_ones_do_not_widen_it() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random((100, 1)) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first[:, 0])[:10]] = 0
    paired = difference(second, first)
    assert paired.value == pytest.approx(-0.1)
    assert paired.high < 0  # though the two scores' own intervals overlap
    assert score(first).low < score(second).high


def test_arms_that_agree_on_all_items_may_still_differ_on_others() -> None:
    few, many = np.ones((10, 2)), np.ones((1000, 2))
    assert difference(few, few).value == 0
    assert difference(few, few).high > 0.15
    assert difference(many, many).high < 0.01


def test_a_pair_counts_only_where_both_have_a_score() -> None:
    nan = float("nan")
    first = np.array([[1.0, nan], [1.0, 0.0], [nan, nan]])
    second = np.array([[0.0, 1.0], [1.0, nan], [1.0, 1.0]])
    assert difference(first, second).value == 0.5


@pytest.mark.parametrize("items", [30, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flips", [0.03, 0.15])
@pytest.mark.parametrize("one_sided", [False, True])
def test_difference_intervals_cover(
    items: int, flips: float, one_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixquant.evaluate.benchmarks.statistics.RESAMPLES", 599)
    rng = np.random.default_rng(items)
    true = -flips if one_sided else 0.0
    hits = 0
    for _ in range(250):
        flipped = rng.random((items, 1)) < flips
        first = ((rng.random((items, 1)) < 0.5) | (flipped & one_sided)).astype(float)
        second = np.where(flipped, 1 - first, first)
        estimate = difference(second, first)
        hits += estimate.low <= true <= estimate.high
    assert hits / 250 >= 0.93


def test_groups_count_what_they_are_told_to() -> None:
    groups = ["easy"] * 3 + ["hard"]
    weights = item_weights(groups, {"easy": 1, "hard": 1, "absent": 5})
    scores = np.array([[1.0], [1.0], [1.0], [0.0]])
    assert score(scores, weights).value == pytest.approx(0.5)
    assert score(scores, item_weights(groups, {})).value == pytest.approx(0.75)
    assert difference(scores, np.zeros((4, 1)), weights).value == pytest.approx(0.5)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1), st.integers(1, 4))
def test_weights_that_are_proportional_to_the_groups_sizes_change_nothing(
    groups: list[str], seeds: int
) -> None:
    rng = np.random.default_rng(len(groups))
    scores = rng.integers(0, 2, (len(groups), seeds)).astype(float)
    weights = item_weights(groups, {name: groups.count(name) for name in "abc"})
    with_weights, without = score(scores, weights), score(scores)
    assert with_weights.low == pytest.approx(without.low)
    assert with_weights.high == pytest.approx(without.high)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_recovery_is_none_without_loss_and_runs_from_0_to_1(bf16: float, quantized: float) -> None:
    if bf16 <= quantized:
        assert recovery(bf16, quantized, 0.5) is None
    else:
        assert recovery(bf16, quantized, quantized) == 0
        assert recovery(bf16, quantized, bf16) == 1


def test_recovery_of_the_papers_averages() -> None:
    assert recovery(0.4285, 0.3864, 0.4145) == pytest.approx(0.667, abs=1e-3)
