"""The parts of a page: sections, one for each file, with panels and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from mixquant.report.plots import Alt


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first of a row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: bool = False  # cells of words, which wrap, rather than of figures


@dataclass(frozen=True)
class Panel:
    """A plot, what it means, and its numbers: in a sentence for the alternative text, and as a table."""

    title: str
    meaning: str
    numbers: str
    draw: Callable[[Alt], Markup]
    table: Table


@dataclass(frozen=True)
class KeyFigure:
    """A number to remember, in large type."""

    value: str
    meaning: str
    is_loss: bool = False


@dataclass(frozen=True)
class Section:
    """What one file holds, without what all kinds of files have."""

    title: str
    verdict: str = ""  # the result in a few sentences, with where it holds; "" if there is none
    key_figures: tuple[KeyFigure, ...] = ()
    notes: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()  # shown on demand
