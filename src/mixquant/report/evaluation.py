"""Benchmark scores with their intervals, paired differences, and how much of the loss is won back."""

from __future__ import annotations

import json
from functools import partial

from mixquant.report.axes import Point, Series
from mixquant.report.derived import arms_of
from mixquant.report.evaluation_words import mean_scores, verdict
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import Bar, bars, intervals
from mixquant.report.style import Look, looks
from mixquant.report.text import clauses, count, listed, percent, points
from mixquant.results import BASELINE, Difference, Evaluation, Recovery

_MEAN = "mean"


def section(evaluation: Evaluation) -> Section:
    """What an evaluation file shows. Shares become percent, differences percentage points."""
    arms = arms_of([arm.name for arm in evaluation.arms] + [s.arm for s in evaluation.scores])
    looked = looks([*arms, *(d.arm for d in evaluation.differences)])
    return Section(
        title="Benchmark scores",
        verdict=verdict(evaluation, arms),
        key_figures=_key_figures(evaluation, arms),
        notes=tuple(
            f"{s.benchmark}, {s.arm}: {count(s.failed)} of {count(s.items * s.seeds)} requests got "
            "no answer in the end; they count as wrong."
            for s in evaluation.scores
            if s.failed
        )
        + tuple(
            f"{s.benchmark}, {s.arm}: in {count(s.unextracted)} of {count(s.items * s.seeds)} answers "
            f"({percent(s.unextracted / (s.items * s.seeds))}) no letter, number or call was found; "
            "they count as wrong."
            for s in evaluation.scores
            if s.unextracted and s.items * s.seeds
        ),
        panels=(
            *_scores(evaluation, arms, looked),
            *_differences(evaluation.differences, looked),
            *_recoveries(evaluation.recoveries, looked),
        ),
        tables=(*_answers(evaluation), *_parts(evaluation, arms), *_settings(evaluation)),
    )


def _key_figures(evaluation: Evaluation, arms: tuple[str, ...]) -> tuple[KeyFigure, ...]:
    means, benchmarks = mean_scores(evaluation)
    over = f"mean of {benchmarks} benchmarks" if benchmarks > 1 else "score"
    figures = [KeyFigure(percent(means[arm]), f"{arm}: {over}") for arm in arms if arm in means]
    figures += [
        KeyFigure(
            f"{100 * r.recovery:.0f} %",
            f"{r.arm}: of the loss of quantizing everything won back ({r.benchmark})",
        )
        for r in evaluation.recoveries
        if r.recovery is not None and r.benchmark == _MEAN
    ]
    return tuple(figures[:5])


def _scores(evaluation: Evaluation, arms: tuple[str, ...], looked: dict[str, Look]) -> list[Panel]:
    scores = evaluation.scores
    if not scores:
        return []
    benchmarks = tuple(dict.fromkeys(s.benchmark for s in scores))
    found = {(s.benchmark, s.arm): s for s in scores}
    means, common = mean_scores(evaluation)
    shown = [arm for arm in arms if any(s.arm == arm for s in scores)]
    said = [
        f"{name} "
        + listed(
            [
                f"{arm} {percent(s.score)} ± {100 * (s.high - s.low) / 2:.1f}"
                for arm in shown
                if (s := found.get((name, arm)))
            ]
        )
        for name in benchmarks[:3]
    ]
    if len(benchmarks) > 3 and means:
        said = [f"mean of {common}, " + listed([f"{arm} {percent(means[arm])}" for arm in shown])]
    rows = [
        (
            name,
            *(
                f"{percent(s.score)} ({percent(s.low)} to {percent(s.high)})"
                if (s := found.get((name, arm)))
                else "–"
                for arm in shown
            ),
            listed(
                sorted({f"{count(s.items)} × {s.seeds}" for s in scores if s.benchmark == name})
            ),
        )
        for name in benchmarks
    ]
    if common > 1:
        rows.append((f"mean of {common}", *(percent(means[arm]) for arm in shown), ""))
    return [
        Panel(
            "Scores with 95 % intervals",
            "Further right is better. The thin bars are 95 % intervals of each score alone; whether "
            "two arms differ, the paired differences say more sharply, since they compare the same "
            "items.",
            f"Scores: {clauses(said)}.",
            partial(
                intervals,
                groups=benchmarks,
                series=[
                    Series(
                        arm,
                        looked[arm],
                        tuple(
                            Point(position, 100 * s.score, 100 * s.low, 100 * s.high)
                            for position, name in enumerate(benchmarks)
                            if (s := found.get((name, arm)))
                        ),
                    )
                    for arm in shown
                ],
                x_label="Score, %; more is better",
            ),
            Table("Scores (95 % interval)", ("Benchmark", *shown, "Items × seeds"), tuple(rows)),
        )
    ]


def _differences(differences: tuple[Difference, ...], looked: dict[str, Look]) -> list[Panel]:
    if not differences:
        return []
    benchmarks = tuple(dict.fromkeys(d.benchmark for d in differences))
    pairs = tuple(dict.fromkeys((d.arm, d.versus) for d in differences))
    several = len({versus for _, versus in pairs}) > 1
    # Two comparisons of one arm need two looks.
    own = (
        looks(f"{arm} − {versus}" for arm, versus in pairs)
        if several
        else {f"{arm} − {versus}": looked[arm] for arm, versus in pairs}
    )
    found = {(d.benchmark, d.arm, d.versus): d for d in differences}
    clear = [d for d in differences if d.low > 0 or d.high < 0]
    meaning = (
        "Each mark is an arm's score minus another's on the same items. A bar that crosses zero is "
        "no difference beyond chance."
    )
    said = (
        f"{len(clear)} of {len(differences)} differences are clear of zero: "
        + listed(
            [f"{d.benchmark}, {d.arm} − {d.versus}: {points(d.difference)}" for d in clear[:6]]
        )
        + (", among others" if len(clear) > 6 else "")
        if clear
        else f"none of {len(differences)} differences is clear of zero; the largest: "
        + _largest(differences)
    )
    return [
        Panel(
            "Paired differences with 95 % intervals",
            meaning,
            f"{said[:1].upper()}{said[1:]}.",
            partial(
                intervals,
                groups=benchmarks,
                series=[
                    Series(
                        name,
                        own[name],
                        tuple(
                            Point(position, 100 * d.difference, 100 * d.low, 100 * d.high)
                            for position, benchmark in enumerate(benchmarks)
                            if (d := found.get((benchmark, arm, versus)))
                        ),
                    )
                    for arm, versus in pairs
                    for name in (f"{arm} − {versus}",)
                ],
                x_label="Percentage points; right of zero is better",
                reference=0.0,
            ),
            Table(
                "Differences in percentage points (95 % interval), same items and seeds",
                ("Benchmark", *(f"{arm} − {versus}" for arm, versus in pairs)),
                tuple(
                    (
                        benchmark,
                        *(
                            f"{points(d.difference)} ({points(d.low)} to {points(d.high)})"
                            if (d := found.get((benchmark, arm, versus)))
                            else "–"
                            for arm, versus in pairs
                        ),
                    )
                    for benchmark in benchmarks
                ),
            ),
        )
    ]


def _largest(differences: tuple[Difference, ...]) -> str:
    d = max(differences, key=lambda d: abs(d.difference))
    return f"{d.benchmark}, {d.arm} − {d.versus}: {points(d.difference)} percentage points"


def _recoveries(recoveries: tuple[Recovery, ...], looked: dict[str, Look]) -> list[Panel]:
    known = [r for r in recoveries if r.recovery is not None]
    if not known:
        return []
    several = len({r.arm for r in recoveries}) > 1
    style = looks([BASELINE, *(r.arm for r in recoveries)]) | looked

    def name(r: Recovery) -> str:
        return f"{r.benchmark}, {r.arm}" if several else r.benchmark

    said = [f"{name(r)} {100 * (r.recovery or 0.0):.0f} %" for r in known]
    nothing = [name(r) for r in recoveries if r.recovery is None]
    finding = "Share of the loss of quantizing everything that is won back: " + listed(said)
    if nothing:
        finding += f"; nothing was lost in {listed(nothing)}"
    return [
        Panel(
            "Recovery" if several else f"Recovery by {known[0].arm}",
            "How much of what quantizing both phases loses is won back: 0 is as low as quantizing "
            "everything, the dashed line at 100 is BF16's score."
            + (f" Quantizing everything lost nothing in {listed(nothing)}." if nothing else ""),
            f"{finding}.",
            partial(
                bars,
                rows=[
                    Bar(
                        name(r),
                        style[r.arm],
                        100 * (r.recovery or 0.0),
                        f"{100 * (r.recovery or 0.0):.0f} %",
                    )
                    for r in known
                ],
                x_label=f"% of the loss; 100 is {BASELINE}'s score",
                reference=100.0,
            ),
            Table(
                "Recovery: (arm − quantized) / (bf16 − quantized)",
                ("Benchmark", "Arm", "Recovery"),
                tuple(
                    (
                        r.benchmark,
                        r.arm,
                        "nothing lost" if r.recovery is None else f"{100 * r.recovery:.0f} %",
                    )
                    for r in recoveries
                ),
            ),
        )
    ]


def _answers(evaluation: Evaluation) -> tuple[Table, ...]:
    scores = [s for s in evaluation.scores if s.answer_tokens is not None]
    if not scores:
        return ()
    rows = tuple(
        (
            s.benchmark,
            s.arm,
            percent(1 - s.unextracted / answers) if answers else "–",
            "–" if s.prompt_tokens is None else count(round(s.prompt_tokens)),
            "–" if s.answer_tokens is None else count(round(s.answer_tokens)),
        )
        for s in scores
        for answers in (s.items * s.seeds - s.failed,)
    )
    headings = ("Benchmark", "Arm", "Extracted", "Prompt, tokens", "Answer, tokens")
    return (Table("Answers with something to score, and mean lengths", headings, rows),)


def _parts(evaluation: Evaluation, arms: tuple[str, ...]) -> tuple[Table, ...]:
    found = {(s.benchmark, s.arm): s for s in evaluation.subscores}
    shown = [arm for arm in arms if any(s.arm == arm for s in evaluation.subscores)]
    rows = tuple(
        (
            name,
            *(
                f"{percent(s.score)} ({percent(s.low)} to {percent(s.high)})"
                if (s := found.get((name, arm)))
                else "–"
                for arm in shown
            ),
        )
        for name in dict.fromkeys(s.benchmark for s in evaluation.subscores)
    )
    if not rows:
        return ()
    return (Table("Sub-scores (95 % interval)", ("Group", *shown), rows),)


def _settings(evaluation: Evaluation) -> tuple[Table, ...]:
    if not evaluation.settings:
        return ()
    rows = tuple(
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in evaluation.settings.items()
    )
    return (Table("Settings", ("Setting", "Value"), rows, True),)
