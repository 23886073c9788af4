"""Ratios to BF16, the Pareto front and mean scores, apart from the page."""

from __future__ import annotations

from typing import Any

import pytest
import sample_results
from hypothesis import given
from hypothesis import strategies as st
from sample_results import measurement

from mixquant.report.derived import pareto_front, speedups
from mixquant.report.evaluation_words import mean_scores


class TestSpeedups:
    def test_times_and_rates(self) -> None:
        found = speedups(
            [
                measurement("bf16", "ttft", 200.0),
                measurement("mixquant", "ttft", 160.0),
                measurement("bf16", "prefill", 200.0, unit="tok/s"),
                measurement("mixquant", "prefill", 160.0, unit="tok/s"),
            ]
        )
        assert [(s.arm, s.ratio) for s in found] == [("mixquant", 1.25), ("mixquant", 0.8)]

    @pytest.mark.parametrize(
        "other",
        [
            {"tokens": 4096},
            {"concurrency": 2},
            {"workload": "batch"},
            {"unit": "s"},
            {"metric": "tpot"},
        ],
    )
    def test_only_of_the_same_condition(self, other: dict[str, Any]) -> None:
        fields = {"metric": "ttft", **other}
        metric = fields.pop("metric")
        own = measurement("mixquant", metric, 160.0, **fields)
        assert speedups([measurement("bf16", "ttft", 200.0), own]) == ()

    def test_agent_traces_of_different_length(self) -> None:
        # The answers are part of the next prompt: the arms' mean lengths differ.
        trace = {"workload": "agent", "unit": "ms"}
        (found,) = speedups(
            [
                measurement("bf16", "ttft", 30.0, tokens=3000, **trace),
                measurement("mixquant", "ttft", 20.0, tokens=3010, **trace),
            ]
        )
        assert found.ratio == 1.5

    def test_shares_and_zeros_have_none(self) -> None:
        for unit, value in (("share", 0.5), ("ms", 0.0)):
            base, own = (
                measurement(arm, "quantized", value, unit=unit) for arm in ("bf16", "mixquant")
            )
            assert speedups([base, own]) == ()

    @given(
        base=st.tuples(*[st.floats(1, 1e4)] * 3).map(sorted),
        own=st.tuples(*[st.floats(1, 1e4)] * 3).map(sorted),
        unit=st.sampled_from(["ms", "tok/s"]),
    )
    def test_bounds_hold_every_pair_of_runs(
        self, base: list[float], own: list[float], unit: str
    ) -> None:
        (found,) = speedups(
            measurement(arm, "x", run[1], lowest=run[0], highest=run[2], unit=unit)
            for arm, run in (("bf16", base), ("mixquant", own))
        )
        assert found.low is not None and found.high is not None
        for a in base:
            for b in own:
                ratio = b / a if unit == "tok/s" else a / b
                assert found.low <= ratio * (1 + 1e-9)
                assert found.high >= ratio * (1 - 1e-9)
        assert found.low <= found.ratio <= found.high

    def test_no_bounds_without_spread(self) -> None:
        (found,) = speedups(
            [measurement("bf16", "ttft", 2.0, lowest=1.0), measurement("mixquant", "ttft", 1.0)]
        )
        assert (found.low, found.high) == (None, None)


coordinates = st.lists(
    st.tuples(*[st.integers(0, 8).map(float) | st.floats(0, 8)] * 2), max_size=20
)


class TestParetoFront:
    def test_by_hand(self) -> None:
        points = [(16, 0), (8, 3), (4, 9), (8, 4), (5, 9)]
        assert pareto_front([(float(a), float(b)) for a, b in points]) == [2, 1, 0]

    @given(coordinates)
    def test_definition(self, points: list[tuple[float, float]]) -> None:
        def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
            return a[0] <= b[0] and a[1] <= b[1] and a != b

        front = pareto_front(points)
        assert bool(front) == bool(points)
        for i in front:
            assert not any(beats(other, points[i]) for other in points)
        for i in set(range(len(points))) - set(front):
            assert any(beats(points[j], points[i]) for j in front)

    @given(coordinates)
    def test_falls_from_left_to_right(self, points: list[tuple[float, float]]) -> None:
        front = [points[i] for i in pareto_front(points)]
        assert front == sorted(front)
        assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)

    @given(coordinates, st.randoms())
    def test_order_does_not_matter(self, points: list[tuple[float, float]], random: Any) -> None:
        shuffled = random.sample(points, len(points))
        assert sorted(points[i] for i in pareto_front(points)) == sorted(
            shuffled[i] for i in pareto_front(shuffled)
        )


def test_mean_scores_are_over_what_all_arms_have() -> None:
    evaluation = sample_results.evaluation()
    without = evaluation.scores[:-1]  # aime25 of mixquant
    means, benchmarks = mean_scores(evaluation.model_copy(update={"scores": without}))
    assert benchmarks == 2
    assert means["bf16"] == pytest.approx((0.912 + 0.428) / 2)
    assert means["mixquant"] == pytest.approx((0.902 + 0.414) / 2)
