"""A matplotlib figure as SVG inside an HTML page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from mixquant.report.style import STAND_INS

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mixquant",  # the same figure gives the same SVG
    "text.parse_math": False,  # a dollar sign in an arm's name is not mathematics
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_INS["muted"],
    "axes.labelcolor": STAND_INS["ink"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": STAND_INS["grid"],
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.9,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6.5,
    "text.color": STAND_INS["ink"],
    "xtick.color": STAND_INS["muted"],
    "ytick.color": STAND_INS["muted"],
    "xtick.labelcolor": STAND_INS["ink"],
    "ytick.labelcolor": STAND_INS["ink"],
}
_HIDDEN = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_VARIABLES = {value: f"var(--{name})" for name, value in STAND_INS.items()}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@contextmanager
def plot_settings() -> Iterator[None]:
    """Settings under which figures are made and written, whatever the user's matplotlibrc says."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        # Letters that matplotlib's font lacks are measured wrongly; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def inline(figure: Figure, identity: str, title: str, description: str) -> Markup:
    """An ``<svg>`` element.

    Args:
        identity: begins every ``id`` in it; unique on the page.
        title: a few words, without figures.
        description: what the plot shows, in words and numbers, for those who do not see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_HIDDEN)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # it would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = _attributes(element.attrib, identity)
    _drop_unused_ids(root)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-labelledby": f"{identity}-title {identity}-desc",
    }
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{identity}-{tag}"})
        element.text = text
        root.insert(position, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(attributes: dict[str, str], identity: str) -> dict[str, str]:
    kept = {}
    for name, value in attributes.items():
        name = name.rpartition("}")[2]  # xlink:href is plain href in HTML
        if name == "id":
            value = f"{identity}-{value}"
        elif name == "href" and value.startswith("#"):
            value = f"#{identity}-{value[1:]}"
        value = _REFERENCE.sub(rf"url(#{identity}-\1)", value)
        if name == "style":
            value = re.sub(r"font-family:[^;]*;? ?", "", value)
        if name in ("style", "fill", "stroke"):
            for color, variable in _VARIABLES.items():
                value = value.replace(color, variable)
        kept[name] = value
    return kept


def _drop_unused_ids(root: ElementTree.Element) -> None:
    used = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if name == "href":
                used.add(value[1:])
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
