"""An evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from mixquant.results import Evaluation, Recovery, Score

_UNEXTRACTED = (
    " None in: the share of answers in which no letter, number or call was found; they count "
    "as wrong."
)
_NO_SCORE = " -: every request failed."


def tables(result: Evaluation) -> list[Table]:
    """The scores as the paper has them; what the answers are like; and, if there are several arms,
    what sets them apart."""
    shown = [_scores(result)]
    if any(score.answer_tokens is not None for score in result.scores):
        shown.append(_answers(result))
    if result.differences:
        shown.append(_differences(result))
    return shown


def _scores(result: Evaluation) -> Table:
    arms = [arm.name for arm in result.arms]
    table = Table(
        title=f"{result.model}: scores in percent",
        title_justify="left",
        caption="Below each score: its 95 % interval, over items. Failed requests count "
        "as wrong."
        + _UNEXTRACTED * any(score.unextracted for score in result.scores)
        + _NO_SCORE * any(_all_failed(score) for score in result.scores),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("benchmark")
    table.add_column("items", justify="right")
    table.add_column("seeds", justify="right")
    for arm in arms:
        table.add_column(arm, justify="right", no_wrap=True)
    for name in dict.fromkeys(score.benchmark for score in result.scores):
        groups = [part for part in result.subscores if part.benchmark.startswith(f"{name}/")]
        for row in (name, *dict.fromkeys(part.benchmark for part in groups)):
            label = row if row == name else f"  {row.removeprefix(f'{name}/')}"
            by_arm = {s.arm: s for s in (*result.scores, *groups) if s.benchmark == row}
            first = next(iter(by_arm.values()))
            cells = (_cell(by_arm.get(arm)) for arm in arms)
            table.add_row(label, str(first.items), str(first.seeds), *cells)
    if means := _means(result.scores, arms):
        table.add_section()
        table.add_row("mean", "", "", *(f"{100 * mean:.1f}" for mean in means))
    return table


def _answers(result: Evaluation) -> Table:
    table = Table(
        title="Answers",
        title_justify="left",
        caption="Extracted: the share of answers with a letter, number or call to score. Lengths: mean "
        "tokens, with reasoning.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("benchmark")
    table.add_column("")
    for heading in ("extracted", "prompt", "answer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(score.benchmark for score in result.scores):
        for score in result.scores:
            if score.benchmark == name:
                lengths = (_tokens(score.prompt_tokens), _tokens(score.answer_tokens))
                table.add_row(name, score.arm, _extracted(score), *lengths)
        table.add_section()
    return table


def _extracted(score: Score) -> str:
    answers = score.items * score.seeds - score.failed
    return f"{1 - score.unextracted / answers:.1%}" if answers else "-"


def _tokens(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:,.0f}"


def _all_failed(score: Score) -> bool:
    """Whether no request of it was answered, so that its score says nothing of the model."""
    return score.failed == score.items * score.seeds > 0


def _cell(score: Score | None) -> str:
    if score is None or _all_failed(score):
        return "-"
    interval = f"{100 * score.low:.1f} - {100 * score.high:.1f}"
    cell = f"{100 * score.score:.1f}\n[dim]{interval}[/dim]"
    if score.unextracted:
        share = score.unextracted / (score.items * score.seeds)
        cell += f"\n[dim]none in {share:.1%}[/dim]"
    return cell


def _means(scores: Sequence[Score], arms: Sequence[str]) -> list[float]:
    """Of each arm, over the benchmarks that all arms have a score of, if they are several."""
    by_benchmark: dict[str, dict[str, float]] = {}
    for score in scores:
        if _all_failed(score):
            continue
        by_benchmark.setdefault(score.benchmark, {})[score.arm] = score.score
    complete = [row for row in by_benchmark.values() if len(row) == len(arms)]
    if len(complete) < 2:
        return []
    return [sum(row[arm] for row in complete) / len(complete) for arm in arms]


def _differences(result: Evaluation) -> Table:
    table = Table(
        title="Differences in points, paired by item and seed",
        title_justify="left",
        caption="Recovery: the share of the loss from bf16 to quantized that an arm wins back; "
        "in brackets where that loss itself may be chance."
        if result.recoveries
        else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("benchmark")
    table.add_column("")
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    names = [one.benchmark for one in result.differences]
    names += [one.benchmark for one in result.recoveries]
    for name in dict.fromkeys(names):
        for row in _rows(result, name):
            table.add_row(*row)
        table.add_section()
    return table


def _rows(result: Evaluation, name: str) -> Iterator[tuple[str, ...]]:
    by_chance = False
    failed = {
        score.arm
        for score in result.scores
        if name in (score.benchmark, "mean") and _all_failed(score)
    }
    for one in result.differences:
        if one.benchmark == name:
            if failed & {one.arm, one.versus}:
                yield name, f"{one.arm} - {one.versus}", "-", "-"
                continue
            interval = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
            yield name, f"{one.arm} - {one.versus}", f"{100 * one.difference:+.1f}", interval
            by_chance |= (one.arm, one.versus) == ("quantized", "bf16") and one.high >= 0
    for one_back in result.recoveries:
        if one_back.benchmark == name:
            share = _share(one_back, by_chance)
            if failed & {one_back.arm, "bf16", "quantized"}:
                share = "-"
            yield name, f"recovery of {one_back.arm}", share, ""


def _share(recovery: Recovery, by_chance: bool) -> str:
    if recovery.recovery is None:
        return "-"
    return f"({recovery.recovery:.0%})" if by_chance else f"{recovery.recovery:.0%}"
