"""The look of arms and kinds of work: a colour, a marker and a hatch each, so colour is never
needed.

Colours are names of CSS variables, which the page sets for light and for dark. Matplotlib needs
real colours: it gets those of ``STAND_INS``, and svg.py puts the variables in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from mixquant.results import BASELINE

VARIABLES = ("ink", "muted", "grid", "surface", "gain", "loss", *(f"series-{i}" for i in range(8)))
STAND_INS = {name: f"#0a{number:02x}fe" for number, name in enumerate(VARIABLES)}

_MARKERS = "osD^vPX*"
_HATCHES = ("", "////", "xxx", "\\\\\\\\", "---", "|||", "+++", "///---")
_DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
)


@dataclass(frozen=True)
class Look:
    """One series' appearance."""

    variable: str
    marker: str
    hatch: str
    dashes: tuple[int, tuple[float, ...]]

    @property
    def color(self) -> str:
        return STAND_INS[self.variable]


def color(variable: str) -> str:
    """What stands for a CSS variable in a matplotlib figure."""
    return STAND_INS[variable]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name. The usual arms look alike on every page, the others by their order."""
    fixed = {BASELINE: 0, "mixquant": 1, "quantized": 2}
    others = count(len(fixed))
    return {
        name: _look(fixed[name] if name in fixed else next(others)) for name in dict.fromkeys(names)
    }


def kinds_of_work(names: Iterable[str]) -> dict[str, Look]:
    """The same for the parts of a stacked bar."""
    return {name: _look(number) for number, name in enumerate(dict.fromkeys(names))}


def _look(number: int) -> Look:
    return Look(
        f"series-{number % 8}",
        _MARKERS[number % len(_MARKERS)],
        _HATCHES[number % len(_HATCHES)],
        _DASHES[number // 2 % len(_DASHES)],
    )
