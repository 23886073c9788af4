"""The kinds of plots that a page has. Each takes plain values and returns an ``<svg>`` element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mixquant.report.axes import (
    LEAST,
    Point,
    Series,
    add_legend,
    clip_spread,
    distances,
    draw_spread,
    figure_and_axes,
    from_zero_by_decades,
    key,
    label_outermost,
    name_rows,
    shifts,
    spaced,
)
from mixquant.report.style import Look, color
from mixquant.report.svg import inline
from mixquant.report.text import number, tick

_HEIGHT = 3.1  # inches


@dataclass(frozen=True)
class Alt:
    """What a plot is called on the page, and what it shows, in words and numbers."""

    identity: str
    title: str
    description: str


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
    with figure_and_axes(_HEIGHT) as (figure, axes):
        has_spread = any(p.low is not None for one in series for p in one.points)
        apart = shifts(len(series)) if has_spread else [1.0] * len(series)
        for shift, one in zip(apart, series, strict=True):
            at = [p.x * shift for p in one.points]
            values = [p.y for p in one.points]
            axes.plot(at, values, color=one.look.color, linestyle=one.look.dashes, zorder=2)
            spread = distances([(p.y, p.low, p.high) for p in one.points])
            if spread is not None:
                draw_spread(axes, at, values, one.look.color, y=spread)
            axes.plot(
                at,
                values,
                color=one.look.color,
                marker=one.look.marker,
                linestyle="none",
                zorder=4,
            )
        xs = sorted({p.x for one in series for p in one.points})
        if xs[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(spaced(xs), [tick(x) for x in spaced(xs)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(False, axis="x")
        ys = [p.y for one in series for p in one.points]
        if log_y and min(ys) > LEAST and max(ys) > 8 * min(ys):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))
        axes.margins(x=0.08, y=0.16)
        clip_spread(axes, [p for one in series for p in one.points], reference)
        if reference is not None:
            axes.axhline(reference[0], color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        label_outermost(axes, series)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        keys: list[tuple[Artist, str]] = [(key(one.look), one.name) for one in series]
        if reference is not None:
            line = Line2D([], [], color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
            keys.append((line, reference[1]))
        add_legend(figure, keys)
        return inline(figure, alt.identity, alt.title, alt.description)


def bars(alt: Alt, rows: Sequence[Bar], x_label: str, *, reference: float | None = None) -> Markup:
    """Horizontal bars from zero, the first on top, each with its value."""
    cut = 2 * max(row.value for row in rows)  # of spreads, for `clip_spread`'s reason
    with figure_and_axes(0.75 + 0.36 * len(rows)) as (figure, axes):
        for y, row in enumerate(rows):
            high = None if row.high is None else min(row.high, cut)
            axes.barh(
                y,
                row.value,
                height=0.66,
                color=row.look.color,
            )
            spread = distances([(row.value, row.low, high)])
            if spread is not None:
                draw_spread(axes, [row.value], [y], color("ink"), x=spread)
            end = max(row.value, row.value if high is None else high, 0.0)
            axes.annotate(row.label, (end, y), (8, 0), textcoords="offset points", va="center")
        if reference is not None:
            axes.axvline(reference, color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        widest = max((len(row.label) for row in rows), default=0)
        name_rows(axes, [row.name for row in rows])
        axes.margins(x=min(0.05 + 0.022 * widest, 0.6))
        if all(row.value >= 0 for row in rows):
            axes.set_xlim(left=0)
        axes.set_xlabel(x_label, loc="right")  # long names leave the axis short
        return inline(figure, alt.identity, alt.title, alt.description)


def stacks(alt: Alt, rows: Sequence[Stack], looks: dict[str, Look], x_label: str) -> Markup:
    """Horizontal bars of parts that add up, with each part's hatch."""
    with figure_and_axes(1.05 + 0.36 * len(rows)) as (figure, axes):
        for y, row in enumerate(rows):
            begin = 0.0
            for kind, value in row.parts:
                axes.barh(
                    y,
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
                number(begin), (begin, y), (6, 0), textcoords="offset points", va="center"
            )
        name_rows(axes, [row.name for row in rows])
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
        add_legend(figure, keys)
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
    with figure_and_axes(1.05 + len(groups) * max(0.2 * len(series), 0.34)) as (figure, axes):
        for index, one in enumerate(series):
            shift = (index + 0.5) * each - 0.4
            values = [p.y for p in one.points]
            xs = [p.x + shift for p in one.points]
            interval = distances([(p.y, p.low, p.high) for p in one.points])
            if interval is not None:
                draw_spread(axes, values, xs, one.look.color, x=interval)
            axes.plot(
                values,
                xs,
                color=one.look.color,
                marker=one.look.marker,
                linestyle="none",
                zorder=4,
            )
        if reference is not None:
            axes.axvline(reference, color=color("muted"), linestyle=(0, (4, 3)), linewidth=1.4)
        name_rows(axes, groups)
        for border in range(1, len(groups)):
            axes.axhline(border - 0.5, color=color("grid"), linewidth=0.8)
        axes.set_xlabel(x_label, loc="right")  # long names leave the axis short
        add_legend(figure, [(key(one.look, line=False), one.name) for one in series])
        return inline(figure, alt.identity, alt.title, alt.description)


def scatter(
    alt: Alt,
    series: Sequence[Series],
    front: Sequence[Point],
    x_label: str,
    y_label: str,
    *,
    front_name: str = "Pareto front",
) -> Markup:
    """One point a series, the better the lower and the further left, and a front.

    The front is ringed where it is of some of the points, and a line where it has many of its own.
    """
    few = len(front) <= len(series)
    with figure_and_axes(_HEIGHT + 0.3) as (figure, axes):
        dashed = (0, (4, 3))
        axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color=color("muted"),
            linestyle=dashed,
            linewidth=1.4,
            marker="o" if few else "",
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
        from_zero_by_decades(axes, [p.y for one in series for p in one.points])
        axes.margins(x=0.12, y=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        keys: list[tuple[Artist, str]] = [(key(one.look, line=False), one.name) for one in series]
        ring = Line2D(
            [],
            [],
            color=color("muted"),
            linestyle=dashed,
            linewidth=1.4,
            marker="o" if few else "",
            markersize=10,
            markerfacecolor="none",
            markeredgewidth=1.4,
        )
        add_legend(figure, [*keys, (ring, front_name)])
        return inline(figure, alt.identity, alt.title, alt.description)
