"""What a page is made of: sections, one for each file, of panels and tables."""

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
    """A plot, what it shows in a sentence, and its figures as a table."""

    title: str
    finding: str
    draw: Callable[[Alt], Markup]
    table: Table


@dataclass(frozen=True)
class KeyFigure:
    """What one should take away, as large type."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """What one file holds, without what all kinds of files have."""

    title: str
    key_figures: tuple[KeyFigure, ...] = ()
    notes: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()  # shown on demand
