"""The kinds of plots that a page has. Each takes plain values and returns an ``<svg>`` element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mixquant.report.style import Look, color
from mixquant.report.svg import inline, plot_settings
from mixquant.report.text import number, plain, short, tick

_WIDTH = 5.0  # inches; half of the page, or all of a telephone's
_HEIGHT = 3.1
_MOST_LABELS = 6  # of values, beside the points of a line
_LEAST = 1e-9  # a divergence below it is rounding; logarithmic axes begin there


@dataclass(frozen=True)
class Alt:
    """What a plot is called on the page, and what it shows, in words and numbers."""

    identity: str
    title: str
    description: str


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    look: Look
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Bar:
    name: str
    look: Look
    value: float
    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Stack:
    """A bar of several parts, in the order of the legend."""

    name: str
    parts: tuple[tuple[str, float], ...]


def lines(
    alt: Alt,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    reference: tuple[float, str] | None = None,
    log_y: bool = False,
) -> Markup:
    """Series over a common, logarithmic axis of counts, with the spread of each point."""
    with _axes(_HEIGHT) as (figure, axes):
        for one in series:
            axes.errorbar(
                [p.x for p in one.points],
                [p.y for p in one.points],
                yerr=_spread([(p.y, p.low, p.high) for p in one.points]),
                color=one.look.color,
                marker=one.look.marker,
                linestyle=one.look.dashes,
                elinewidth=1.4,
                capsize=3,
            )
        xs = sorted({p.x for one in series for p in one.points})
        if xs[0] > 0:
            axes.set_xscale("log")
        axes.set_xticks(_spaced(xs), [tick(x) for x in _spaced(xs)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(False, axis="x")
        ys = [p.y for one in series for p in one.points]
        if log_y and min(ys) > _LEAST and max(ys) > 8 * min(ys):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))
        axes.margins(x=0.08, y=0.16)
        _hold_off_spread(axes, [p for one in series for p in one.points], reference)
        if reference is not None:
            axes.axhline(reference[0], color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        _label_outermost(axes, series)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        keys: list[tuple[Artist, str]] = [(_key(one.look), one.name) for one in series]
        if reference is not None:
            line = Line2D([], [], color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
            keys.append((line, reference[1]))
        _legend(figure, keys)
        return inline(figure, alt.identity, alt.title, alt.description)


def bars(alt: Alt, rows: Sequence[Bar], x_label: str, *, reference: float | None = None) -> Markup:
    """Horizontal bars from zero, the first on top, each with its value."""
    cut = 2 * max(row.value for row in rows)  # of spreads, for `_hold_off_spread`'s reason
    with _axes(0.75 + 0.36 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            high = None if row.high is None else min(row.high, cut)
            axes.barh(
                place,
                row.value,
                height=0.66,
                color=row.look.color,
                xerr=_spread([(row.value, row.low, high)]),
                ecolor=color("ink"),
                capsize=3,
            )
            end = max(row.value, row.value if high is None else high, 0.0)
            axes.annotate(row.label, (end, place), (6, 0), textcoords="offset points", va="center")
        if reference is not None:
            axes.axvline(reference, color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        widest = max((len(row.label) for row in rows), default=0)
        _rows(axes, [row.name for row in rows])
        axes.margins(x=min(0.05 + 0.022 * widest, 0.6))
        if all(row.value >= 0 for row in rows):
            axes.set_xlim(left=0)
        axes.set_xlabel(x_label, loc="right")  # long names leave the axis short
        return inline(figure, alt.identity, alt.title, alt.description)


def stacks(alt: Alt, rows: Sequence[Stack], looks: dict[str, Look], x_label: str) -> Markup:
    """Horizontal bars of parts that add up, with each part's hatch."""
    with _axes(1.05 + 0.36 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            begin = 0.0
            for kind, value in row.parts:
                axes.barh(
                    place,
                    value,
                    left=begin,
                    height=0.66,
                    color=looks[kind].color,
                    hatch=looks[kind].hatch,
                    edgecolor=color("surface"),
                    linewidth=0.8,
                )
                begin += value
            axes.annotate(
                number(begin), (begin, place), (6, 0), textcoords="offset points", va="center"
            )
        _rows(axes, [row.name for row in rows])
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label, loc="right")  # long names leave the axis short
        keys = [
            (
                Patch(
                    facecolor=look.color, hatch=look.hatch, edgecolor=color("surface"), linewidth=0
                ),
                kind,
            )
            for kind, look in looks.items()
        ]
        _legend(figure, keys)
        return inline(figure, alt.identity, alt.title, alt.description)


def intervals(
    alt: Alt,
    groups: Sequence[str],
    series: Sequence[Series],
    x_label: str,
    *,
    reference: float | None = None,
) -> Markup:
    """Points with intervals, grouped on the vertical axis; a point's ``x`` is its group's number
    and its ``y`` the value, so that a series is the same thing as in `lines`.
    """
    each = 0.8 / max(len(series), 1)
    with _axes(1.05 + len(groups) * max(0.2 * len(series), 0.34)) as (figure, axes):
        for place, one in enumerate(series):
            shift = (place + 0.5) * each - 0.4
            axes.errorbar(
                [p.y for p in one.points],
                [p.x + shift for p in one.points],
                xerr=_spread([(p.y, p.low, p.high) for p in one.points]),
                color=one.look.color,
                marker=one.look.marker,
                linestyle="none",
                elinewidth=1.6,
                capsize=3,
            )
        if reference is not None:
            axes.axvline(reference, color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        _rows(axes, groups)
        for border in range(1, len(groups)):
            axes.axhline(border - 0.5, color=color("grid"), linewidth=0.8)
        axes.set_xlabel(x_label, loc="right")  # long names leave the axis short
        _legend(figure, [(_key(one.look, line=False), one.name) for one in series])
        return inline(figure, alt.identity, alt.title, alt.description)


def scatter(
    alt: Alt,
    series: Sequence[Series],
    front: Sequence[Point],
    x_label: str,
    y_label: str,
) -> Markup:
    """One point a series, the better the lower and the further left, and the Pareto front."""
    with _axes(_HEIGHT + 0.3) as (figure, axes):
        dashed = (0, (4, 3))
        axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color=color("muted"),
            linestyle=dashed,
            linewidth=1.4,
            marker="o",
            markersize=15,
            markerfacecolor="none",
            markeredgewidth=1.4,
        )
        for one in series:
            axes.plot(
                [p.x for p in one.points],
                [p.y for p in one.points],
                color=one.look.color,
                marker=one.look.marker,
                markersize=8,
                linestyle="none",
            )
        _from_zero_by_decades(axes, [p.y for one in series for p in one.points])
        axes.margins(x=0.12, y=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        keys: list[tuple[Artist, str]] = [(_key(one.look, line=False), one.name) for one in series]
        ring = Line2D(
            [],
            [],
            color=color("muted"),
            linestyle=dashed,
            linewidth=1.4,
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgewidth=1.4,
        )
        _legend(figure, [*keys, (ring, "Pareto front")])
        return inline(figure, alt.identity, alt.title, alt.description)


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    with plot_settings():
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def _spread(
    values: Sequence[tuple[float, float | None, float | None]],
) -> tuple[list[float], list[float]] | None:
    """Distances to lowest and highest; 0 where they are not known."""
    if all(low is None or high is None for _, low, high in values):
        return None
    below = [0.0 if low is None else max(value - low, 0.0) for value, low, _ in values]
    above = [0.0 if high is None else max(high - value, 0.0) for value, _, high in values]
    return below, above


def _spaced(xs: Sequence[float]) -> list[float]:
    """Those of sorted counts that have room for their numbers on the axis."""
    scale = math.log if xs[0] > 0 else float
    room = (scale(xs[-1]) - scale(xs[0])) / 7
    kept = [xs[0]]
    for x in xs[1:]:
        if scale(x) - scale(kept[-1]) >= room:
            kept.append(x)
    return kept


def _hold_off_spread(
    axes: Axes, points: Sequence[Point], reference: tuple[float, str] | None
) -> None:
    """Cuts error bars that would dwarf the values: one slow token among thousands is enough."""
    ys = [p.y for p in points] + ([] if reference is None else [reference[0]])
    room = max(max(ys) - min(ys), 0.3 * max(map(abs, ys)))
    least, most = axes.get_ylim()
    if axes.get_yscale() == "linear" and (least < min(ys) - room or most > max(ys) + room):
        axes.set_ylim(max(least, min(ys) - room), min(most, max(ys) + room))


def _label_outermost(axes: Axes, series: Sequence[Series]) -> None:
    """Writes values above the highest and below the lowest series, where there are few of them."""
    by_x: dict[float, list[Point]] = {}
    for one in series:
        for point in one.points:
            by_x.setdefault(point.x, []).append(point)
    if len(by_x) > _MOST_LABELS:
        return
    for points in by_x.values():
        ordered = sorted(points, key=lambda p: p.y)
        least, most = axes.get_ylim()
        top = min(max(p.y if p.high is None else p.high for p in points), most)
        bottom = max(min(p.y if p.low is None else p.low for p in points), least)
        chosen = [(ordered[-1], top, 7, "bottom")]
        if len(ordered) > 1:
            chosen.append((ordered[0], bottom, -7, "top"))
        for point, end, shift, side in chosen:
            if point.label:
                axes.annotate(
                    point.label,
                    (point.x, end),
                    (0, shift),
                    textcoords="offset points",
                    ha="center",
                    va=side,
                    fontsize=9.5,
                )


def _from_zero_by_decades(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis that has a zero, too: BF16's distance from itself."""
    positive = [value for value in values if value > _LEAST]
    if not positive:
        return
    least = 10.0 ** math.floor(math.log10(min(positive)))
    most = 10.0 ** math.ceil(math.log10(max(positive)))
    if all(value > _LEAST for value in values):
        axes.set_yscale("log")
        ticks: list[float] = []
    else:
        axes.set_yscale("symlog", linthresh=least, linscale=0.6)
        ticks = [0.0]
    decades = round(math.log10(most / least))
    ticks += [least * 10**power for power in range(0, decades + 1, 1 + decades // 6)]
    axes.set_yticks(ticks, [tick(y) for y in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _key(look: Look, *, line: bool = True) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.color,
        marker=look.marker,
        linestyle=look.dashes if line else "none",
    )


def _legend(figure: Figure, keys: Sequence[tuple[Artist, str]]) -> None:
    """Above the plot. Texts are set afterwards: matplotlib leaves out names that begin with _."""
    if not keys:
        return
    names = [short(plain(name)) for _, name in keys]
    columns = max(1, min(len(names), 52 // (max(len(name) for name in names) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(names) / columns) - 1))
    legend = figure.legend(
        [key for key, _ in keys],
        ["x" * len(name) for name in names],
        loc="outside upper left",
        ncols=columns,
        handlelength=2.4,
        columnspacing=1.4,
        borderpad=0.2,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
