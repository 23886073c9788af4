"""What the plots share: series of points, axes, labels of values, legends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mixquant.report.style import Look, color
from mixquant.report.svg import plot_settings
from mixquant.report.text import plain, short, tick

_WIDTH = 5.0  # inches; half of the page, or the width of a phone
_MAX_LABELS = 6  # of values, beside the points of a line
LEAST = 1e-9  # a divergence below it is rounding; logarithmic axes begin there


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


@contextmanager
def figure_and_axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    with plot_settings():
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if abs(axes.dataLim.x1) < 1000 else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def distances(
    values: Sequence[tuple[float, float | None, float | None]],
) -> tuple[list[float], list[float]] | None:
    """Distances to lowest and highest; 0 where they are not known."""
    if all(low is None or high is None for _, low, high in values):
        return None
    below = [0.0 if low is None else max(value - low, 0.0) for value, low, _ in values]
    above = [0.0 if high is None else max(high - value, 0.0) for value, _, high in values]
    return below, above


def spaced(xs: Sequence[float]) -> list[float]:
    """Those of sorted counts that have margin for their numbers on the axis."""
    scale = math.log if xs[0] > 0 else math.log1p
    margin = (scale(xs[-1]) - scale(xs[0])) / 7
    kept = [xs[0]]
    for x in xs[1:]:
        if scale(x) - scale(kept[-1]) >= margin:
            kept.append(x)
    return kept


def clip_spread(axes: Axes, points: Sequence[Point], reference: tuple[float, str] | None) -> None:
    """Clips error bars that would dwarf the values: one slow token among thousands is enough for
    that."""
    ys = [p.y for p in points] + ([] if reference is None else [reference[0]])
    margin = max(max(ys) - min(ys), 0.3 * max(map(abs, ys)))
    least, most = axes.get_ylim()
    if axes.get_yscale() == "linear" and (least < min(ys) - margin or most > max(ys) + margin):
        axes.set_ylim(max(least, min(ys) - margin), min(most, max(ys) + margin))


def label_outermost(axes: Axes, series: Sequence[Series]) -> None:
    """Writes values above the highest and below the lowest series, where there are few of them."""
    by_x: dict[float, list[Point]] = {}
    for one in series:
        for point in one.points:
            by_x.setdefault(point.x, []).append(point)
    if len(by_x) > _MAX_LABELS:
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
                    zorder=5,
                    bbox={"facecolor": color("surface"), "edgecolor": "none", "pad": 0.5},
                )


def from_zero_by_decades(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis that has a zero, too: BF16's distance from itself."""
    positive = [value for value in values if value > LEAST]
    if not positive:
        return
    least = 10.0 ** math.floor(math.log10(min(positive)))
    most = 10.0 ** math.ceil(math.log10(max(positive)))
    if all(value > LEAST for value in values):
        axes.set_yscale("log")
        ticks: list[float] = []
    else:
        axes.set_yscale("symlog", linthresh=least, linscale=0.6)
        ticks = [0.0]
    decades = round(math.log10(most / least))
    ticks += [least * 10**power for power in range(0, decades + 1, 1 + decades // 6)]
    axes.set_yticks(ticks, [tick(y) for y in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def draw_spread(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    look_color: str,
    *,
    x: tuple[list[float], list[float]] | None = None,
    y: tuple[list[float], list[float]] | None = None,
) -> None:
    """Error bars with caps, on a halo that sets them off from bars, lines and markers behind."""
    for drawn, width in ((color("surface"), 4.0), (look_color, 1.6)):
        bars = axes.errorbar(
            xs,
            ys,
            xerr=x,
            yerr=y,
            fmt="none",
            ecolor=drawn,
            elinewidth=width,
            capsize=5 if width < 2 else 6,
            capthick=width,
        )
        for part in (*bars.lines[1], *bars.lines[2]):
            part.set_zorder(3 if width < 2 else 2.9)


def shifts(number: int) -> list[float]:
    """Factors that set several series apart at the same position of a logarithmic axis."""
    return [1.035 ** (index - (number - 1) / 2) for index in range(number)]


def key(look: Look, *, line: bool = True) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.color,
        marker=look.marker,
        linestyle=look.dashes if line else "none",
    )


def add_legend(figure: Figure, keys: Sequence[tuple[Artist, str]]) -> None:
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
