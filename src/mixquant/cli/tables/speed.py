"""Measurements of speed as tables for a terminal: one for each workload, one row for each arm."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mixquant.bench.summary import (
    Place,
    crossover,
    gains,
    nothing_quantized,
    place_of,
    reference_of,
)
from mixquant.results import Measurement

TITLES = {
    "length": "By prompt length: one request at a time x tokens",
    "batch": "By batch size: requests sent at once x tokens of each",
    "concurrency": "By concurrency: requests kept in flight x tokens of each",
    "turns": "Turns: new tokens behind cached ones",
    "agent": "Agent trace: sessions at a time x tokens of a prompt, on average",
}

# Metrics and their headings; times in ms. The others are in the file: 80 columns are full.
_COLUMNS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("total", "tok/s"))
_NOTHING_QUANTIZED = (
    "quant 0%: no token of these prompts was quantized (those with fewer tokens than the recipe's "
    "min_prefill_tokens are read in BF16), so there is no speed-up to show."
)
_SHARES = (("quantized", "quant"), ("cached", "cached"))


def tables(found: Sequence[Measurement]) -> list[Table]:
    """A table for each workload that was measured.

    A median is followed by its speed relative to the reference, and a time to first token by its
    range. An arm that quantized nothing has no ratio.
    """
    names = list(dict.fromkeys(figure.workload for figure in found))
    return [_table(workload, found) for workload in names]


def threshold(found: Sequence[Measurement]) -> str | None:
    """What the turns say about ``min_prefill_tokens``, with a recipe; None where there are none."""
    arms = {figure.arm for figure in found if figure.workload == "turns"}
    if not {"bf16", "mixquant"} <= arms:
        return None
    least = crossover(found, "mixquant")
    if least is None:
        return (
            "mixquant answers later than bf16 in the longest of these turns, or quantized none of "
            "them: nothing is known of the best min_prefill_tokens."
        )
    return (
        f"From {least} new tokens on, mixquant answers no later than bf16 in these turns. The recipe "
        f'for this machine: {{"min_prefill_tokens": {least - 1}}}'
    )


def _table(workload: str, found: Sequence[Measurement]) -> Table:
    own = [figure for figure in found if figure.workload == workload]
    by_key = {(f.arm, place_of(f), f.metric): f for f in own}
    gained = gains(own)
    reference = reference_of(dict.fromkeys(figure.arm for figure in own))
    metrics = {figure.metric for figure in own}
    shown = [column for column in _COLUMNS if column[0] in metrics]
    shares = [column for column in _SHARES if column[0] in metrics]

    unquantized = {arm for arm, *_ in nothing_quantized(own)} - {reference}
    table = Table(
        title=TITLES.get(workload, workload),
        title_justify="left",
        caption=_NOTHING_QUANTIZED if unquantized else None,
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for metric, heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
        if metric == "ttft":
            table.add_column("", style="dim", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for _, heading in shares:
        table.add_column(heading, justify="right", no_wrap=True)

    before = None
    for arm, place in dict.fromkeys((f.arm, place_of(f)) for f in _sorted(own)):
        cells = ["" if place == before else _said(place), arm]
        for metric, _ in shown:
            figure = by_key.get((arm, place, metric))
            gain = gained.get((arm, place, metric))
            cells.append("–" if figure is None else _digits(figure.value))
            if metric == "ttft":
                cells.append("" if figure is None else _range(figure))
            cells.append("" if gain is None or arm == reference else f"{gain:.2f}x")
        for metric, _ in shares:
            figure = by_key.get((arm, place, metric))
            cells.append("–" if figure is None else f"{100 * figure.value:.0f}%")
        table.add_row(*cells)
        before = place
    return table


def _said(place: Place) -> str:
    _, tokens, cached, concurrency = place
    return f"{concurrency} x {tokens}" if cached is None else f"{tokens} behind {cached}"


def _sorted(found: Sequence[Measurement]) -> list[Measurement]:
    """Point by point, the arms of each in the order in which they were run."""
    order = {arm: place for place, arm in enumerate(dict.fromkeys(f.arm for f in found))}
    return sorted(found, key=lambda f: (f.cached or 0, f.tokens, f.concurrency, order[f.arm]))


def _range(figure: Measurement) -> str:
    if figure.lowest is None or figure.highest is None:
        return ""
    return f"{_digits(figure.lowest)}-{_digits(figure.highest)}"


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
