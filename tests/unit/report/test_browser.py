"""The page in a real Chromium, Debian's: on screens wide and narrow, light and dark, and on paper."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_results
from paths import RESULTS

from mixquant import results
from mixquant.report import page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

H200 = RESULTS / "h200.json"
LONG = "an arm with a name that is much longer than one would think_of_any_arm_at_all"

# Every element that has text of its own: its colour, and the one that lies behind it.
TEXT_COLORS = """() => {
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
    return 'none';
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || ['title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const color = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    found.push([element.tagName, color, behind(element), element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
# Every colour that a series of a plot is drawn in, and the one that lies behind it.
SERIES_COLORS = """() => {
  const root = getComputedStyle(document.documentElement);
  const probe = document.body.appendChild(document.createElement('p'));
  const names = [...Array(8).keys()].map(i => `--series-${i}`);
  const colors = [...names, '--surface'].map(name => {
    probe.style.color = root.getPropertyValue(name);
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return colors;
}"""
# What reaches beyond the page, and was not made to scroll.
OVERFLOWING = """() => [...document.body.querySelectorAll('*')]
  .filter(e => !e.closest('svg') && !e.closest('.scroll') || e.matches('.scroll, figure > svg'))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))"""
# Texts that stand outside of the plot they belong to.
CUT_OFF = """() => [...document.querySelectorAll('svg text')].filter(e => {
  const own = e.getBoundingClientRect(), all = e.closest('svg').getBoundingClientRect();
  return own.left < all.left - 1 || own.right > all.right + 1
    || own.top < all.top - 1 || own.bottom > all.bottom + 1;
}).map(e => e.textContent)"""


# Lines that an element's text takes.
LINES = """(element) => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return range.getClientRects().length;
}"""
# Error bars, their caps apart, and the halos behind them: the style, and how wide on the screen.
SPREADS = """(svg) => [...svg.querySelectorAll('path')]
  .filter(e => /^fill: none.* stroke-width: (1.6|4)$/.test(e.getAttribute('style')))
  .map(e => [e.getAttribute('style').includes('--surface') ? 'halo' : 'bar',
    parseFloat(getComputedStyle(e).strokeWidth) * e.getScreenCTM().a])"""
# Cells of a heat map that have a tint: number, its colour, and the tint with what lies behind.
CELLS = """() => {
  const surface = getComputedStyle(document.querySelector('figure')).backgroundColor;
  const texts = [...document.querySelectorAll('svg text')]
    .filter(e => /^\\d\\.\\d\\d$/.test(e.textContent));
  const tints = [...document.querySelectorAll('svg path')]
    .filter(e => /--(gain|loss)/.test(e.getAttribute('style')));
  const inside = (a, b) => a.left >= b.left && a.right <= b.right && a.top >= b.top
    && a.bottom <= b.bottom;
  return texts.flatMap(text => {
    const box = text.getBoundingClientRect();
    const tint = tints.find(e => inside(box, e.getBoundingClientRect()));
    if (!tint) return [];
    const style = getComputedStyle(tint);
    return [[text.textContent, getComputedStyle(text).fill, style.fill,
      parseFloat(style.opacity), surface]];
  });
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind of file, and one with all of them and a name that is too long."""
    folder = tmp_path_factory.mktemp("pages")
    samples = [
        make()
        for make in (
            sample_results.bench,
            sample_results.fidelity,
            sample_results.evaluation,
            sample_results.comparison,
            sample_results.tuning,
        )
    ]
    long = [
        type(sample).model_validate_json(results.to_json(sample).replace('quantized"', f'{LONG}"'))
        for sample in samples
    ]
    pages = {
        "h200": page([("h200.json", results.read(H200))]),
        "turns": page([("turns.json", sample_results.turns())]),
        "tuning": page([("tune.json", results.read(RESULTS / "tune_smollm2.json"))]),
        "all": page([(f"{sample.kind}.json", sample) for sample in samples]),
        "long": page([(f"{LONG}.json", sample) for sample in long]),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def visit(chromium: Any, files: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; the test fails if the page asks for anything, or complains."""
    context = chromium.new_context()
    asked: list[str] = []
    complaints: list[str] = []

    def open_page(name: str, *, scheme: str = "light", width: int = 1200) -> Any:
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(files[name].as_uri())
        assert asked.pop(0) == files[name].as_uri()
        return tab

    yield open_page
    context.close()
    assert asked == []
    assert complaints == []


schemes = pytest.mark.parametrize("scheme", ["light", "dark"])
names = pytest.mark.parametrize("name", ["h200", "turns", "all", "long"])


@schemes
@names
def test_plots_are_there(visit: Any, name: str, scheme: str) -> None:
    tab = visit(name, scheme=scheme)
    plots = tab.locator("figure > svg")
    assert plots.count() == {"h200": 3, "turns": 1, "all": 20, "long": 20}[name]
    for n in range(plots.count()):
        box = plots.nth(n).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 80
        # Something is drawn in it, in the colours of the scheme.
        assert plots.nth(n).locator("path").count() > 3
        assert plots.nth(n).locator("text").count() > 3


def test_alt_texts(visit: Any) -> None:
    tab = visit("h200")
    said = (
        r"^Time to first token by prompt length Above .* Speed against bf16 .*: mixquant 1.10× to"
    )
    assert tab.get_by_role("img", name=re.compile(said)).count() == 1
    assert tab.get_by_role("img", name=re.compile(r"\d")).count() == 3


def test_schemes_differ(visit: Any) -> None:
    backgrounds = [
        visit("h200", scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    light, dark = (luminance(color) for color in backgrounds)
    assert light > 0.8
    assert dark < 0.05


@schemes
def test_contrast(visit: Any, scheme: str) -> None:
    tab = visit("all", scheme=scheme)
    texts = tab.evaluate(TEXT_COLORS)
    assert len(texts) > 400
    assert {"text", "TD", "P", "B", "DD", "SUMMARY", "STRONG", "A"} <= {tag for tag, *_ in texts}
    for tag, color, behind, text in texts:
        assert contrast(color, behind) >= 4.5, (tag, color, behind, text)
    *series, surface = tab.evaluate(SERIES_COLORS)
    assert len(set(series)) == 8
    for color in series:
        assert contrast(color, surface) >= 3, color


@names
@pytest.mark.parametrize("width", [320, 400, 768, 1200, 2400])
def test_nothing_is_cut_off(visit: Any, name: str, width: int) -> None:
    tab = visit(name, width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [400, 1200])
def test_texts_in_plots_can_be_read(visit: Any, width: int) -> None:
    tab = visit("all", width=width)
    sizes = tab.evaluate(
        "() => [...document.querySelectorAll('svg text')].map("
        "e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
        ".filter(size => size > 0)"
    )
    assert min(sizes) >= 9


def test_figures_open(visit: Any) -> None:
    tab = visit("h200")
    assert not tab.get_by_text("216.2 (211.7 to 227.5)").is_visible()
    tab.get_by_text("Show the numbers").first.click()
    assert tab.get_by_text("216.2 (211.7 to 227.5)").is_visible()


@names
def test_on_paper(visit: Any, name: str) -> None:
    tab = visit(name, scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    tab.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins, in CSS pixels
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 688
    # Paper is white whatever the screen is, and tables need no click.
    assert luminance(tab.evaluate("getComputedStyle(document.body).color")) < 0.05
    assert all(
        cell.is_visible() and cell.bounding_box()["height"] > 0
        for cell in tab.locator("figure td").all()
    )
    for figure in tab.locator("figure").all():
        assert figure.bounding_box()["height"] < 1000  # a page holds it
    pdf = tab.pdf(format="A4", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pages >= 2


@pytest.mark.parametrize("width", [1000, 1200, 2400])
@names
def test_no_hole_in_the_grid(visit: Any, name: str, width: int) -> None:
    tab = visit(name, width=width)
    for panels in tab.locator(".panels").all():
        room = panels.bounding_box()
        boxes = [figure.bounding_box() for figure in panels.locator("figure").all()]
        rows: dict[float, float] = {}
        for box in boxes:
            rows[box["y"]] = max(rows.get(box["y"], 0.0), box["x"] + box["width"])
        assert len(rows) == len(boxes) // 2 + len(boxes) % 2
        assert all(right == pytest.approx(room["x"] + room["width"]) for right in rows.values())


@schemes
def test_error_bars_can_be_seen(visit: Any, scheme: str) -> None:
    tab = visit("h200", scheme=scheme)
    for figure in tab.locator("figure > svg").all():
        strokes = figure.evaluate(SPREADS)
        halos = [width for kind, width in strokes if kind == "halo"]
        bars = [width for kind, width in strokes if kind == "bar"]
        assert len(halos) == len(bars) >= 2
        assert min(bars) >= 1.3  # CSS pixels
        assert min(halos) >= 2 * min(bars)  # so that they stand out on a bar of any colour


@schemes
def test_heat_map(visit: Any, scheme: str) -> None:
    tab = visit("turns", scheme=scheme)
    cells = tab.evaluate(CELLS)
    assert len(cells) == 12  # those in brackets are not read
    for text, color, fill, opacity, surface in cells:
        behind = [
            opacity * top + (1 - opacity) * bottom
            for top, bottom in zip(channels(fill), channels(surface), strict=True)
        ]
        mixed = f"rgb({', '.join(str(round(part)) for part in behind)})"
        assert contrast(color, mixed) >= 4.5, (text, color, mixed)
        red, _, blue = behind
        assert (red > blue) == (float(text) < 1), (text, mixed)
    most, none = (tab.locator("svg text", has_text=re.compile(f"^{n}$")) for n in ("98,304", "0"))
    assert most.bounding_box()["y"] < none.bounding_box()["y"]


@pytest.mark.parametrize("width", [320, 1200])
def test_names_of_arms_are_in_one_line(visit: Any, width: int) -> None:
    names = visit("tuning", width=width).locator(".compared dt").all()
    assert len(names) == 9
    for name in names:
        assert name.evaluate(LINES) == 1, name.text_content()


def test_a_table_that_is_too_wide_scrolls(visit: Any) -> None:
    tab = visit("all", width=320)
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    widest = tab.evaluate(
        "() => Math.max(...[...document.querySelectorAll('.scroll')]"
        ".map(e => e.scrollWidth - e.clientWidth))"
    )
    assert widest > 0


def channels(color: str) -> list[int]:
    """Red, green and blue of a colour as getComputedStyle writes it, 0 to 255."""
    return [int(part) for part in re.findall(r"\d+", color)[:3]]


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2.2."""
    red, green, blue = (part / 255 for part in channels(color))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
