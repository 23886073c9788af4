"""Speed: ratios to BF16 by prompt length, batch size and concurrency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from mixquant.report.axes import Point, Series
from mixquant.report.breakdown import breakdowns
from mixquant.report.derived import BASELINE, Speedup, arms_of, higher_is_better, speedups
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import Alt, Bar, bars, lines
from mixquant.report.style import Look, looks
from mixquant.report.text import (
    clauses,
    count,
    metric_name,
    number,
    quantity,
    spread,
    times,
)
from mixquant.results import Bench, Measurement

_ORDER = ("length", "batch", "concurrency", "agent")
# What large type says, of what there is.
_KEY_FIGURES = 4
_MAIN = (("length", "ttft"), ("batch", "tpot"), ("concurrency", "output"), ("agent", "ttft"))
# What follows from the others, or varies little: as tables, without plots.
_TABLES_ONLY = ("itl", "e2e", "total", "cached")
_AXES = {"length": ("Prompt tokens", "prompt length"), "batch": ("Batch size", "batch size")}
_CLIENTS = ("Concurrent requests", "concurrency")


def section(bench: Bench) -> Section:
    """What a speed file shows: a panel for each metric and workload, and one for each profile."""
    looked = looks(
        arms_of(
            [arm.name for arm in bench.arms]
            + [m.arm for m in bench.results]
            + [piece.arm for piece in bench.breakdown]
        )
    )
    groups = _groups(bench.results)
    shown = [group for group in groups if group.is_plotted]
    main_first = sorted(shown, key=lambda group: (group.workload, group.metric) not in _MAIN)
    figures = [figure for group in main_first if (figure := _key_figure(group))]
    return Section(
        title="Speed",
        key_figures=tuple(figures[:_KEY_FIGURES]),
        panels=tuple(_panel(group, looked) for group in shown) + breakdowns(bench.breakdown),
        more=tuple(
            _table(group, speedups(group.results)) for group in groups if not group.is_plotted
        ),
    )


@dataclass(frozen=True)
class _Group:
    """What one plot shows: one metric, along one axis."""

    workload: str
    metric: str
    unit: str
    fixed: int | None  # the other of prompt length and concurrency; None: a trace has all lengths
    results: tuple[Measurement, ...]

    def x(self, m: Measurement) -> int:
        return m.tokens if self.workload == "length" else m.concurrency

    def of(self, arm: str) -> list[Measurement]:
        return sorted((m for m in self.results if m.arm == arm), key=self.x)

    @property
    def is_plotted(self) -> bool:
        if self.unit == "share" and self.workload != "agent":
            return False
        return self.metric not in _TABLES_ONLY

    @property
    def arms(self) -> tuple[str, ...]:
        return arms_of(m.arm for m in self.results)

    @property
    def xs(self) -> list[int]:
        return sorted({self.x(m) for m in self.results})

    @property
    def axis(self) -> str:
        return _AXES.get(self.workload, _CLIENTS)[0]

    @property
    def title(self) -> str:
        name = metric_name(self.metric)
        if len(self.xs) > 1:
            by = f" by {_AXES.get(self.workload, _CLIENTS)[1]}"
        else:
            by = f", {_at(self, count(self.xs[0]))}"
        return f"{name}{by}, agent trace" if self.workload == "agent" else name + by

    @property
    def condition(self) -> str:
        """What all of the results have in common."""
        alone = self.xs[0] if len(self.xs) == 1 else None
        tokens, requests = (alone, self.fixed) if self.workload == "length" else (self.fixed, alone)
        said = [] if tokens is None else [f"prompts of {count(tokens)} tokens"]
        if requests is not None:
            said.append(f"{count(requests)} at a time" if requests > 1 else "one at a time")
        return ", ".join(said)


def _groups(results: Sequence[Measurement]) -> list[_Group]:
    members: dict[tuple[str, str, str, int | None], list[Measurement]] = {}
    for m in results:
        fixed = {"length": m.concurrency, "agent": None}.get(m.workload, m.tokens)
        members.setdefault((m.workload, m.metric, m.unit, fixed), []).append(m)
    rank = {workload: place for place, workload in enumerate(_ORDER)}
    return sorted(
        (_Group(*key, tuple(found)) for key, found in members.items()),
        key=lambda group: rank.get(group.workload, len(_ORDER)),
    )


def _panel(group: _Group, looked: dict[str, Look]) -> Panel:
    ratios = speedups(group.results)
    draw: Callable[[Alt], Markup]
    if len(group.xs) == 1:
        draw = partial(bars, rows=_bars(group, ratios, looked), x_label=_scale(group.unit))
    elif ratios:
        draw = partial(
            lines,
            series=_ratio_series(group, ratios, looked),
            x_label=group.axis,
            y_label=f"Times as fast as {BASELINE}",
            reference=(1.0, BASELINE),
        )
    else:
        draw = partial(
            lines,
            series=_series(group, looked),
            x_label=group.axis,
            y_label=_scale(group.unit),
        )
    return Panel(group.title, _finding(group, ratios), draw, _table(group, ratios))


def _bars(group: _Group, ratios: Sequence[Speedup], looked: dict[str, Look]) -> list[Bar]:
    ratio = {r.arm: f", {times(r.ratio)}" for r in ratios}
    return [
        Bar(
            m.arm,
            looked[m.arm],
            _scaled(m.value, m.unit),
            quantity(m.value, m.unit) + ratio.get(m.arm, ""),
            None if m.lowest is None else _scaled(m.lowest, m.unit),
            None if m.highest is None else _scaled(m.highest, m.unit),
        )
        for arm in group.arms
        for m in group.of(arm)
    ]


def _ratio_series(
    group: _Group, ratios: Sequence[Speedup], looked: dict[str, Look]
) -> list[Series]:
    by_x = sorted(ratios, key=lambda r: group.x(r.measurement))
    return [
        Series(
            arm,
            looked[arm],
            tuple(
                Point(group.x(r.measurement), r.ratio, r.low, r.high, times(r.ratio))
                for r in by_x
                if r.arm == arm
            ),
        )
        for arm in arms_of(r.arm for r in ratios)
    ]


def _series(group: _Group, looked: dict[str, Look]) -> list[Series]:
    return [
        Series(
            arm,
            looked[arm],
            tuple(
                Point(
                    group.x(m),
                    _scaled(m.value, m.unit),
                    None if m.lowest is None else _scaled(m.lowest, m.unit),
                    None if m.highest is None else _scaled(m.highest, m.unit),
                    number(_scaled(m.value, m.unit)),
                )
                for m in group.of(arm)
            ),
        )
        for arm in group.arms
    ]


def _scaled(value: float, unit: str) -> float:
    return 100 * value if unit == "share" else value


def _scale(unit: str) -> str:
    return {"share": "percent"}.get(unit, unit) + (
        ""
        if unit == "share"
        else ", more is better"
        if higher_is_better(unit)
        else ", less is better"
    )


def _finding(group: _Group, ratios: Sequence[Speedup]) -> str:
    said = []
    for arm in group.arms:
        own = [r for r in ratios if r.arm == arm]
        if own:
            said.append(f"{arm} {_range(own)}{_most(group, own)}")
        elif not ratios:
            values = [quantity(m.value, m.unit) for m in group.of(arm)]
            said.append(f"{arm} {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else ""))
    condition = f" ({group.condition})" if group.condition else ""
    opening = f"Speed against {BASELINE}" if ratios else "By arm"
    return f"{opening}{condition}: {clauses(said)}."


def _range(own: Sequence[Speedup]) -> str:
    low, high = (f(r.ratio for r in own) for f in (min, max))
    return times(low) if times(low) == times(high) else f"{times(low)} to {times(high)}"


def _most(group: _Group, own: Sequence[Speedup]) -> str:
    if len(own) < 2 or len({times(r.ratio) for r in own}) == 1:
        return ""
    best = max(own, key=lambda r: r.ratio)
    where = count(group.x(best.measurement))
    return f", most at {_at(group, where)}"


def _at(group: _Group, where: str) -> str:
    if group.workload == "length":
        return f"{where} tokens"
    return f"batch size {where}" if group.workload == "batch" else f"{where} at a time"


def _key_figure(group: _Group) -> KeyFigure | None:
    """The main arm's: mixquant if it is there, or whichever is compared first."""
    ratios = speedups(group.results)
    if not ratios:
        return None
    arm = "mixquant" if any(r.arm == "mixquant" for r in ratios) else ratios[0].arm
    own = [r for r in ratios if r.arm == arm]
    where = group.condition
    if len(group.xs) > 1:
        where = _at(group, f"{count(group.xs[0])} to {count(group.xs[-1])}")
    name = metric_name(group.metric).lower()
    trace = ", agent trace" if group.workload == "agent" else ""
    return KeyFigure(
        _range(own).replace("× to ", " to "),
        f"{arm}'s speed against {BASELINE}: {name}{trace}; {where}",
    )


def _table(group: _Group, ratios: Sequence[Speedup]) -> Table:
    compared = arms_of(r.arm for r in ratios)
    found = {(r.arm, group.x(r.measurement)): r for r in ratios}
    rows = []
    for x in group.xs:
        values = {m.arm: m for m in group.results if group.x(m) == x}
        row = [count(x)]
        row += [_value(values.get(arm)) for arm in group.arms]
        row += [_speedup(found.get((arm, x))) for arm in compared]
        rows.append(tuple(row))
    return Table(
        f"{group.title}: median (lowest to highest); {group.condition or 'conditions as above'}",
        (
            group.axis,
            *(f"{arm}, {_scale(group.unit).partition(',')[0]}" for arm in group.arms),
            *(f"{arm}, times as fast" for arm in compared),
        ),
        tuple(rows),
    )


def _value(m: Measurement | None) -> str:
    if m is None:
        return "–"
    scaled = [None if value is None else _scaled(value, m.unit) for value in (m.lowest, m.highest)]
    return number(_scaled(m.value, m.unit)) + spread(scaled[0], scaled[1])


def _speedup(found: Speedup | None) -> str:
    if found is None:
        return "–"
    bounds = (
        "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    )
    return times(found.ratio) + bounds
