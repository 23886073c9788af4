"""An evaluation as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mixquant.results import Evaluation, Score

_NO_INTERVAL = " " * len(" [ 0.0, 100.0]")


def tables(result: Evaluation) -> list[Table]:
    """The scores as the paper has them; and, if there are several arms, what sets them apart."""
    shown = [_scores(result)]
    if result.differences:
        shown.append(_differences(result))
    return shown


def _scores(result: Evaluation) -> Table:
    arms = [arm.name for arm in result.arms]
    table = Table(
        title=f"{result.model}: scores in percent",
        title_justify="left",
        caption="In brackets the interval that holds 95 %, over items. Failed requests count as wrong.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("benchmark", no_wrap=True)
    table.add_column("items", justify="right")
    table.add_column("seeds", justify="right")
    for arm in arms:
        table.add_column(arm, justify="right", no_wrap=True)
    benchmarks = list(dict.fromkeys(score.benchmark for score in result.scores))
    for name in benchmarks:
        table.add_row(*_row(name, name, result.scores, arms))
        parts = [part for part in result.subscores if part.benchmark.startswith(f"{name}/")]
        for part in dict.fromkeys(part.benchmark for part in parts):
            table.add_row(*_row(f"  {part.partition('/')[2]}", part, parts, arms), style="dim")
    complete = [
        name
        for name in benchmarks
        if all(any((s.benchmark, s.arm) == (name, arm) for s in result.scores) for arm in arms)
    ]
    if len(complete) > 1:
        table.add_section()
        means = [
            sum(s.score for s in result.scores if s.arm == arm and s.benchmark in complete)
            / len(complete)
            for arm in arms
        ]
        table.add_row("mean", "", "", *(f"{100 * mean:.1f}{_NO_INTERVAL}" for mean in means))
    return table


def _row(
    label: str, name: str, scores: tuple[Score, ...] | list[Score], arms: list[str]
) -> list[str]:
    its = {score.arm: score for score in scores if score.benchmark == name}
    first = next(iter(its.values()))
    cells = []
    for arm in arms:
        score = its.get(arm)
        if score is None:
            cells.append("-")
            continue
        low, high = 100 * score.low, 100 * score.high
        cells.append(f"{100 * score.score:5.1f} [{low:4.1f}, {high:5.1f}]".replace("[", r"\["))
    return [label, str(first.items), str(first.seeds), *cells]


def _differences(result: Evaluation) -> Table:
    table = Table(
        title="Differences in points, paired by item and seed",
        title_justify="left",
        caption="Recovery: the share of the loss from bf16 to quantized that an arm wins back; "
        "in brackets where that loss itself may be chance.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    pairs = list(dict.fromkeys((one.arm, one.versus) for one in result.differences))
    recovered = list(dict.fromkeys(one.arm for one in result.recoveries))
    table.add_column("benchmark", no_wrap=True)
    for arm, versus in pairs:
        table.add_column(f"{arm}\n- {versus}", justify="right", no_wrap=True)
    for arm in recovered:
        table.add_column(f"recovery\n{arm}", justify="right", no_wrap=True)
    names = [one.benchmark for one in result.differences]
    names += [one.benchmark for one in result.recoveries]
    for name in dict.fromkeys(names):
        its = {(d.arm, d.versus): d for d in result.differences if d.benchmark == name}
        cells = []
        for pair in pairs:
            found = its.get(pair)
            if found is None:
                cells.append("")
                continue
            low, high = 100 * found.low, 100 * found.high
            cells.append(f"{100 * found.difference:+.1f} \\[{low:+.1f}, {high:+.1f}]")
        loss = its.get(("quantized", "bf16"))
        by_chance = loss is not None and loss.high >= 0
        for arm in recovered:
            value = next(
                (r.recovery for r in result.recoveries if (r.benchmark, r.arm) == (name, arm)), None
            )
            text = "-" if value is None else f"{value:.0%}"
            cells.append(f"({text})" if by_chance and value is not None else text)
        table.add_row(name, *cells)
    return table
