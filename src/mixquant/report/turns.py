"""Turns: new prompt tokens behind cached ones, each cell of the grid against BF16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.derived import BASELINE, Speedup, arms_of, speedups, unquantized
from mixquant.report.heatmap import Cell, heatmap, is_loss
from mixquant.report.names import device_name, model_name
from mixquant.report.parts import Panel, Table
from mixquant.report.text import count, metric_name, number, spread, times
from mixquant.results import Bench, Measurement

_METRIC = "ttft"  # what a turn waits for


def verdict(bench: Bench) -> str:
    """In how many turns the main arm is faster and slower; empty if no turn was compared."""
    ratios = _ratios(bench.results)
    arms = arms_of(r.arm for r in ratios)
    if not arms:
        return ""
    main = "mixquant" if "mixquant" in arms else arms[0]
    own = [r for r in ratios if r.arm == main]
    slower = _slower(own)
    said = (
        f"With {main}, {model_name(bench.model)} on {device_name(bench.environment)} answers sooner "
        f"than with BF16 in {len(own) - slower} of {len(own)} kinds of turns and later in {slower}."
    )
    if len(own) > 1:
        lowest, highest = (f(own, key=lambda r: r.ratio) for f in (min, max))
        said += f" Slowest against BF16: {_of(lowest)}. Fastest: {_of(highest)}."
    return said


def panels(results: Sequence[Measurement]) -> tuple[Panel, ...]:
    """A heat map of each arm: times as fast to the first token as BF16, by cached and new tokens."""
    turns = [m for m in results if m.cached is not None and m.metric == _METRIC]
    ratios = _ratios(results)
    idle = {(arm, found[1], found[3]) for arm, found in unquantized(results)}
    return tuple(
        _panel(arm, [r for r in ratios if r.arm == arm], turns, idle)
        for arm in arms_of(m.arm for m in turns)
        if arm != BASELINE and any(r.arm == arm for r in ratios)
    )


def tables(results: Sequence[Measurement]) -> tuple[Table, ...]:
    """All figures of turns, whatever was measured, by metric."""
    turns = [m for m in results if m.cached is not None]
    return tuple(
        _table(metric, unit, [m for m in turns if (m.metric, m.unit) == (metric, unit)])
        for metric, unit in dict.fromkeys((m.metric, m.unit) for m in turns)
    )


def _ratios(results: Sequence[Measurement]) -> list[Speedup]:
    turns = [m for m in results if m.cached is not None and m.metric == _METRIC]
    return list(speedups(turns, unquantized(results)))


def _of(r: Speedup) -> str:
    m = r.measurement
    behind = f"behind {count(m.cached)} cached ones" if m.cached else "with none cached"
    said = times(r.ratio).removesuffix("×")
    return f"{said} times as fast at {count(m.tokens)} new tokens {behind}"


def _slower(ratios: Sequence[Speedup]) -> int:
    """How many are below 1, as the cells show them."""
    return sum(is_loss(r.ratio) for r in ratios)


def _panel(
    arm: str,
    ratios: Sequence[Speedup],
    turns: Sequence[Measurement],
    idle: set[tuple[str, int, int | None]],
) -> Panel:
    own = [m for m in turns if m.arm == arm]
    new = sorted({m.tokens for m in own})
    cached = sorted({m.cached or 0 for m in own})
    found = {(r.measurement.cached or 0, r.measurement.tokens): r for r in ratios}
    cells = [[_cell(found.get((behind, tokens))) for tokens in new] for behind in reversed(cached)]
    slower = _slower(ratios)
    lowest, highest = (f(ratios, key=lambda r: r.ratio) for f in (min, max))
    said = (
        "Each cell is a kind of turn: new prompt tokens behind cached ones. Its number says how many "
        f"times as fast as BF16 {arm} gives the first token. Below 1 (red, bold) {arm} is slower."
    )
    if slower:
        said += f" That is so in {slower} of {len(ratios)} cells."
    else:
        said += " That is so in no cell."
    if any((arm, m.tokens, m.cached) in idle for m in own):
        said += f" A dash: {arm} quantized nothing there."
    return Panel(
        f"Turns with {arm}: speed to the first token",
        said,
        f"{slower} of {len(ratios)} are slower. Slowest: {_of(lowest)}. Fastest: {_of(highest)}.",
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
                        times(r.ratio) if (r := found.get((behind, tokens))) else "–"
                        for tokens in new
                    ),
                )
                for behind in cached
            ),
        ),
    )


def _cell(found: Speedup | None) -> Cell:
    return Cell("–", None) if found is None else Cell(f"{found.ratio:.2f}", found.ratio)


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
