"""Speed: ratios to BF16 by prompt length, batch size and concurrency, and by turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from markupsafe import Markup

from mixquant.report import turns
from mixquant.report.axes import Point, Series
from mixquant.report.bench_groups import Group, groups
from mixquant.report.bench_words import meaning, notes, numbers, verdict
from mixquant.report.breakdown import breakdowns
from mixquant.report.derived import Speedup, arms_of, higher_is_better
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import Alt, Bar, bars, lines
from mixquant.report.style import Look, looks
from mixquant.report.text import count, metric_name, number, quantity, spread, times
from mixquant.results import Bench, Measurement

_KEY_FIGURES = 4
_MAIN = (("length", "ttft"), ("batch", "tpot"), ("concurrency", "output"), ("agent", "ttft"))


def section(bench: Bench) -> Section:
    """The section of a speed file: a panel for each metric and workload, turn grid and profile."""
    looked = looks(
        arms_of(
            [arm.name for arm in bench.arms]
            + [m.arm for m in bench.results]
            + [piece.arm for piece in bench.breakdown]
        )
    )
    found = groups(bench.results)
    shown = [group for group in found if group.is_plotted]
    main_first = sorted(shown, key=lambda group: (group.workload, group.metric) not in _MAIN)
    figures = [figure for group in main_first if (figure := _key_figure(group))]
    return Section(
        title="Speed",
        verdict=f"{turns.verdict(bench)} {verdict(bench, found)}".strip(),
        key_figures=tuple(figures[:_KEY_FIGURES]),
        notes=notes(bench),
        panels=(
            turns.panels(bench.results)
            + tuple(_panel(group, looked) for group in shown)
            + breakdowns(bench.breakdown)
        ),
        more=tuple(_table(group) for group in found if not group.is_plotted)
        + turns.tables(bench.results),
    )


def _panel(group: Group, looked: dict[str, Look]) -> Panel:
    draw: Callable[[Alt], Markup]
    if len(group.xs) == 1:
        draw = partial(bars, rows=_bars(group, looked), x_label=_scale(group.unit))
    elif group.ratios:
        draw = partial(
            lines,
            series=_ratio_series(group, looked),
            x_label=f"{group.axis} (log scale)",
            y_label="Times as fast as BF16",
            reference=(1.0, "BF16"),
        )
    else:
        draw = partial(
            lines,
            series=_series(group, looked),
            x_label=f"{group.axis} (log scale)",
            y_label=_scale(group.unit),
        )
    return Panel(group.title, meaning(group), numbers(group), draw, _table(group))


def _bars(group: Group, looked: dict[str, Look]) -> list[Bar]:
    ratio = {r.arm: f", {times(r.ratio)}" for r in group.ratios}
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


def _ratio_series(group: Group, looked: dict[str, Look]) -> list[Series]:
    return [
        Series(
            arm,
            looked[arm],
            tuple(
                Point(group.x(r.measurement), r.ratio, r.low, r.high, times(r.ratio))
                for r in group.ratios_of(arm)
            ),
        )
        for arm in arms_of(r.arm for r in group.ratios)
    ]


def _series(group: Group, looked: dict[str, Look]) -> list[Series]:
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
    if unit == "share":
        return "percent"
    return f"{unit}, {'more' if higher_is_better(unit) else 'less'} is better"


def _key_figure(group: Group) -> KeyFigure | None:
    """The main arm's: mixquant if it is there, or whichever is compared first."""
    if not group.ratios:
        return None
    arms = arms_of(r.arm for r in group.ratios)
    main = "mixquant" if "mixquant" in arms else arms[0]
    own = group.ratios_of(main)
    low, high = (times(f(r.ratio for r in own)) for f in (min, max))
    name = metric_name(group.metric)
    where = group.at(*group.xs)
    if len(group.xs) == 1 and group.workload == "batch" and group.condition:
        where = group.condition
    if group.workload == "agent":
        where = f"agent trace, {where}"
    return KeyFigure(
        low if low == high else f"{low.removesuffix('×')} to {high}",
        f"{main}'s speed against BF16: {name[:1].lower()}{name[1:]}, {where}",
        is_loss=all(r.sign < 0 for r in own),
    )


def _table(group: Group) -> Table:
    compared = arms_of(r.arm for r in group.ratios)
    found = {(r.arm, group.x(r.measurement)): r for r in group.ratios}
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
