"""Turns: new prompt tokens behind cached ones, each cell of the grid against BF16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.derived import Speedup, arms_of, condition, speedups, unquantized
from mixquant.report.heatmap import Cell, heatmap, is_loss
from mixquant.report.names import device_in_words, model_name
from mixquant.report.parts import Panel, Table
from mixquant.report.text import count, metric_name, number, spread, times
from mixquant.results import Bench, Measurement

_METRIC = "ttft"  # what a turn waits for


def verdict(bench: Bench) -> str:
    """In how many turns the main arm is faster and slower; empty if no turn was compared.

    A turn in which nothing was quantized may be slower, but not faster: a ratio there is no speed-up.
    """
    every = _ratios(bench.results)
    ratios = _quantized(every, bench.results)
    arms = arms_of(r.arm for r in ratios)
    if not arms:
        return ""
    main = "mixquant" if "mixquant" in arms else arms[0]
    own = [r for r in ratios if r.arm == main]
    kinds = [r for r in every if r.arm == main]
    sooner, later = _with(1, own), _with(-1, kinds)
    said = (
        f"With {main}, {model_name(bench.model)} on {device_in_words(bench.environment)} answers sooner "
        f"than with BF16 in {sooner} of {len(kinds)} kinds of turns, later in {later}, and with no "
        f"clear difference in {len(kinds) - sooner - later}."
    )
    if idle := len(kinds) - len(own):
        said += f" It quantized nothing in {idle} of them, which do not count as sooner."
    if len(own) > 1:
        lowest, highest = (f(own, key=lambda r: r.ratio) for f in (min, max))
        said += f" Slowest against BF16: {_of(lowest)}. Fastest: {_of(highest)}."
    return said


def panels(results: Sequence[Measurement]) -> tuple[Panel, ...]:
    """A heat map of each arm: times as fast to the first token as BF16, by cached and new tokens."""
    turns = [m for m in results if m.cached is not None and m.metric == _METRIC]
    every = _ratios(results)
    ratios = _quantized(every, results)
    return tuple(
        _panel(
            arm,
            [r for r in every if r.arm == arm],
            [r for r in ratios if r.arm == arm],
            [m for m in turns if m.arm == arm],
        )
        for arm in arms_of(r.arm for r in ratios)
    )


def tables(results: Sequence[Measurement]) -> tuple[Table, ...]:
    """All figures of turns, whatever was measured, by metric."""
    turns = [m for m in results if m.cached is not None]
    return tuple(
        _table(metric, unit, [m for m in turns if (m.metric, m.unit) == (metric, unit)])
        for metric, unit in dict.fromkeys((m.metric, m.unit) for m in turns)
    )


def _ratios(results: Sequence[Measurement]) -> list[Speedup]:
    return list(speedups([m for m in results if m.cached is not None and m.metric == _METRIC]))


def _quantized(ratios: Sequence[Speedup], results: Sequence[Measurement]) -> list[Speedup]:
    """Without those of turns in which nothing was quantized, as far as the file says it."""
    idle = unquantized(results)
    return [r for r in ratios if (r.arm, condition(r.measurement)) not in idle]


def _of(r: Speedup) -> str:
    m = r.measurement
    behind = f"behind {count(m.cached)} cached ones" if m.cached else "with none cached"
    said = times(r.ratio).removesuffix("×")
    return f"{said} times as fast at {count(m.tokens)} new tokens {behind}"


def _with(sign: int, ratios: Sequence[Speedup]) -> int:
    """How many are faster (1), slower (-1), or neither (0)."""
    return sum(r.sign == sign for r in ratios)


def _panel(
    arm: str, every: Sequence[Speedup], ratios: Sequence[Speedup], own: Sequence[Measurement]
) -> Panel:
    new = sorted({m.tokens for m in own})
    cached = sorted({m.cached or 0 for m in own})
    idle = [r for r in every if r not in ratios]
    found = {(r.measurement.cached or 0, r.measurement.tokens): r for r in every}
    cells = [
        [_cell(found.get((behind, tokens)), idle) for tokens in new] for behind in reversed(cached)
    ]
    slower = sum(is_loss(r.ratio) for r in every)
    lowest, highest = (f(every, key=lambda r: r.ratio) for f in (min, max))
    said = (
        "Each cell is a kind of turn: new prompt tokens behind cached ones. Its number is BF16's time "
        f"to the first token divided by that of {arm}. Below 1 (red, bold) {arm} is slower."
    )
    if slower:
        said += f" That is so in {slower} of {len(every)} cells."
    else:
        said += " That is so in no cell."
    if idle:
        said += f" In brackets: {arm} quantized nothing there."
    return Panel(
        f"Turns with {arm}: speed to the first token",
        said,
        f"{slower} of {len(every)} are slower. Slowest: {_of(lowest)}. Fastest: {_of(highest)}.",
        partial(
            heatmap,
            cells=cells,
            columns=[count(tokens) for tokens in new],
            rows=[count(behind) for behind in reversed(cached)],
            x_label="New prompt tokens",
            y_label="Cached tokens",
        ),
        Table(
            f"Turns with {arm}: times as fast to the first token as BF16",
            ("Cached tokens", *(f"{count(tokens)} new" for tokens in new)),
            tuple(
                (
                    count(behind),
                    *(
                        _shown(r, times(r.ratio), idle)
                        if (r := found.get((behind, tokens)))
                        else "–"
                        for tokens in new
                    ),
                )
                for behind in cached
            ),
        ),
    )


def _cell(found: Speedup | None, idle: Sequence[Speedup]) -> Cell:
    if found is None:
        return Cell("–", None)
    label = _shown(found, f"{found.ratio:.2f}", idle)
    # A gain without anything quantized has no tint; a loss has.
    return Cell(label, None if found in idle and not is_loss(found.ratio) else found.ratio)


def _shown(found: Speedup, value: str, idle: Sequence[Speedup]) -> str:
    """In brackets where nothing was quantized."""
    return f"({value})" if found in idle else value


def _table(metric: str, unit: str, turns: Sequence[Measurement]) -> Table:
    arms = arms_of(m.arm for m in turns)
    conditions = sorted({(m.cached or 0, m.tokens, m.concurrency) for m in turns})
    found = {(m.arm, (m.cached or 0, m.tokens, m.concurrency)): m for m in turns}
    return Table(
        f"{metric_name(metric)} by turn, {unit}: median (lowest to highest)",
        ("Cached tokens", "New tokens", "At a time", *arms),
        tuple(
            (
                *(count(n) for n in one),
                *(
                    number(m.value) + spread(m.lowest, m.highest)
                    if (m := found.get((arm, one)))
                    else "–"
                    for arm in arms
                ),
            )
            for one in conditions
        ),
    )
