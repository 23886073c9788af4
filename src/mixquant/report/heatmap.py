"""A grid of ratios, each cell with its number, so that no colour is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.patches import Rectangle

from mixquant.report.axes import figure_and_axes
from mixquant.report.plots import Alt
from mixquant.report.style import color
from mixquant.report.svg import inline

_STRONGEST = math.log(2)  # of a ratio: twice or half as fast has the full tint
_TINT = 0.5  # of the strongest cell; the number in it stays readable
_WIDE = 7  # columns; of more, the numbers are smaller


@dataclass(frozen=True)
class Cell:
    label: str
    ratio: float | None  # None: no value, no tint


def heatmap(
    alt: Alt,
    cells: Sequence[Sequence[Cell]],
    columns: Sequence[str],
    rows: Sequence[str],
    x_label: str,
    y_label: str,
) -> Markup:
    """Rows of cells, the first on top: red and bold below 1, blue above, no tint at 1."""
    with figure_and_axes(1.0 + 0.42 * len(rows)) as (figure, axes):
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                slower = cell.ratio is not None and is_loss(cell.ratio)
                axes.add_patch(
                    Rectangle(
                        (x - 0.5, y - 0.5),
                        1,
                        1,
                        facecolor=color("loss" if slower else "gain"),
                        alpha=_tint(cell.ratio),
                        linewidth=0,
                    )
                )
                axes.text(
                    x,
                    y,
                    cell.label,
                    ha="center",
                    va="center",
                    fontsize=11 if len(columns) <= _WIDE else 9.5,
                    fontweight="bold" if slower else "normal",
                )
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.grid(False)
        for border in range(1, len(columns)):
            axes.axvline(border - 0.5, color=color("surface"), linewidth=2)
        for border in range(1, len(rows)):
            axes.axhline(border - 0.5, color=color("surface"), linewidth=2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return inline(figure, alt.identity, alt.title, alt.description)


def is_loss(ratio: float) -> bool:
    """Below 1 with the two digits that a cell shows."""
    return round(ratio, 2) < 1


def _tint(ratio: float | None) -> float:
    if ratio is None or ratio <= 0:
        return 0.0
    return _TINT * (0.25 + 0.75 * min(abs(math.log(ratio)) / _STRONGEST, 1.0))
