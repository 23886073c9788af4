"""Fidelity: against cost with the Pareto front, by prompt length, and after the prompt's end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.axes import Point, Series
from mixquant.report.derived import arms_of, pareto_front
from mixquant.report.fidelity_words import notes, trends, verdict
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import lines, scatter
from mixquant.report.style import Look, looks
from mixquant.report.text import clauses, count, listed, number, percent
from mixquant.results import BASELINE, Cost, Divergence, Fidelity


def section(fidelity: Fidelity) -> Section:
    """What a fidelity file shows: two panels for each prompt length, and all figures as tables."""
    results = fidelity.results
    arms = arms_of([arm.name for arm in fidelity.arms] + [d.arm for d in results])
    looked = looks(arms)
    lengths = sorted({d.prompt_tokens for d in results})
    panels: list[Panel] = []
    for length in lengths:
        here = [d for arm in arms for d in results if (d.prompt_tokens, d.arm) == (length, arm)]
        panels += _against_cost(here, fidelity.costs, looked)
        panels += _after_the_prompt(here, looked)
    if len(lengths) > 1:
        panels += _by_length(results, arms, looked)
    return Section(
        title="Fidelity",
        verdict=verdict(fidelity),
        key_figures=_key_figures(results),
        notes=notes(fidelity),
        panels=tuple(panels),
        tables=_tables(fidelity),
    )


def _key_figures(results: Sequence[Divergence]) -> tuple[KeyFigure, ...]:
    """The distance of each arm, at the longest prompt: what there is most of to go wrong."""
    if not results:
        return ()
    longest = max(d.prompt_tokens for d in results)
    return tuple(
        KeyFigure(
            number(d.kl_mean),
            f"{d.arm}: nats per token from BF16 after {count(longest)} prompt tokens; "
            f"same likeliest token {percent(d.top1)}",
        )
        for d in results
        if d.prompt_tokens == longest and d.arm != BASELINE
    )[:4]


def _against_cost(
    here: Sequence[Divergence], costs: Sequence[Cost], looked: dict[str, Look]
) -> list[Panel]:
    bits = {cost.arm: cost.bits for cost in costs}
    here = [d for d in here if d.arm in bits]
    if len(here) < 2:
        return []
    points = [(bits[d.arm], d.kl_mean) for d in here]
    front = pareto_front(points)
    on_it = [f"{here[i].arm} ({number(points[i][0])} bits, {number(points[i][1])})" for i in front]
    off_it = [d.arm for i, d in enumerate(here) if i not in front]
    numbers = f"On the Pareto front: {listed(on_it)}"
    meaning = (
        "Lower is nearer to BF16, further left is cheaper. The dashed line joins the arms that no "
        "other arm beats (the Pareto front)."
    )
    if off_it:
        numbers += f"; beaten: {listed(off_it)}"
        meaning += f" Beaten: {listed(off_it)}. Another arm is at least as near and as cheap."
    title = f"Distance from BF16 against cost, {count(here[0].prompt_tokens)} prompt tokens"
    return [
        Panel(
            title,
            meaning,
            f"{numbers}.",
            partial(
                scatter,
                series=[
                    Series(d.arm, looked[d.arm], (Point(bits[d.arm], d.kl_mean),)) for d in here
                ],
                front=[Point(*points[i]) for i in front],
                x_label="Mean bits of a multiplied weight in prefill",
                y_label="KL from BF16, nats per token",
            ),
            Table(
                title,
                ("Arm", "Bits", "KL, nats per token", "On the Pareto front"),
                tuple(
                    (
                        d.arm,
                        number(points[i][0]),
                        number(points[i][1]),
                        "yes" if i in front else "no",
                    )
                    for i, d in enumerate(here)
                ),
            ),
        )
    ]


def _after_the_prompt(here: Sequence[Divergence], looked: dict[str, Look]) -> list[Panel]:
    shown = [d for d in here if any(p.kl_mean > 0 for p in d.by_position)]
    if not any(len(d.by_position) > 1 for d in shown):
        return []
    said = [
        f"{d.arm} {number(d.by_position[0].kl_mean)} at answer token "
        f"{count(d.by_position[0].first)}, {number(d.by_position[-1].kl_mean)} from token "
        f"{count(d.by_position[-1].first)} on"
        for d in shown
    ]
    title = f"Distance by answer token, {count(here[0].prompt_tokens)} prompt tokens"
    firsts = sorted({p.first for d in shown for p in d.by_position})
    found = {(d.arm, p.first): p for d in shown for p in d.by_position}
    return [
        Panel(
            title,
            trends(
                "A falling line means that the effect of the quantized prompt fades with each "
                "answer token.",
                "the first answer tokens to the last",
                {d.arm: (d.by_position[0].kl_mean, d.by_position[-1].kl_mean) for d in shown},
            ),
            f"KL in nats per token: {clauses(said)}.",
            partial(
                lines,
                series=[
                    Series(
                        d.arm,
                        looked[d.arm],
                        tuple(Point(p.first, p.kl_mean) for p in d.by_position),
                    )
                    for d in shown
                ],
                x_label="Answer token, first of its group (log scale)",
                y_label="KL from BF16, nats per token",
                log_y=True,
            ),
            Table(
                f"{title}: KL in nats per token (same likeliest token)",
                ("From answer token", *(d.arm for d in shown)),
                tuple(
                    (
                        count(first),
                        *(
                            f"{number(p.kl_mean)} ({percent(p.top1)})"
                            if (p := found.get((d.arm, first)))
                            else "–"
                            for d in shown
                        ),
                    )
                    for first in firsts
                ),
            ),
        )
    ]


def _by_length(
    results: Sequence[Divergence], arms: Sequence[str], looked: dict[str, Look]
) -> list[Panel]:
    of = {
        arm: sorted((d for d in results if d.arm == arm), key=lambda d: d.prompt_tokens)
        for arm in arms
    }
    of = {arm: found for arm, found in of.items() if any(d.kl_mean > 0 for d in found)}
    if not of:
        return []
    said = [
        f"{arm} {number(found[0].kl_mean)} at {count(found[0].prompt_tokens)} tokens, "
        f"{number(found[-1].kl_mean)} at {count(found[-1].prompt_tokens)}"
        for arm, found in of.items()
    ]
    lengths = sorted({d.prompt_tokens for d in results})
    value = {(d.arm, d.prompt_tokens): f"{number(d.kl_mean)} ({percent(d.top1)})" for d in results}
    return [
        Panel(
            "Distance from BF16 by prompt length",
            trends(
                "A rising line means that longer prompts move the answers further from BF16.",
                "the shortest prompt to the longest",
                {arm: (found[0].kl_mean, found[-1].kl_mean) for arm, found in of.items()},
            ),
            f"KL in nats per token: {clauses(said)}.",
            partial(
                lines,
                series=[
                    Series(
                        arm,
                        looked[arm],
                        tuple(
                            Point(d.prompt_tokens, d.kl_mean, label=number(d.kl_mean))
                            for d in found
                        ),
                    )
                    for arm, found in of.items()
                ],
                x_label="Prompt tokens (log scale)",
                y_label="KL from BF16, nats per token",
                log_y=True,
            ),
            Table(
                "Distance from BF16 by prompt length: KL in nats per token (same likeliest token)",
                ("Prompt tokens", *of),
                tuple(
                    (count(length), *(value.get((arm, length), "–") for arm in of))
                    for length in lengths
                ),
            ),
        )
    ]


def _tables(fidelity: Fidelity) -> tuple[Table, ...]:
    tables = []
    if fidelity.results:
        answers = {
            f"{count(d.answer_tokens)} tokens in {count(d.answers)} answers"
            for d in fidelity.results
        }
        tables.append(
            Table(
                f"Distance from BF16, teacher-forced ({listed(sorted(answers))})",
                (
                    "Arm",
                    "Prompt tokens",
                    "KL mean",
                    "KL 99 %",
                    "KL max",
                    "Same likeliest token",
                    "Perplexity",
                    "Identical greedy tokens",
                    "Quantized prompt tokens",
                ),
                tuple(
                    (
                        d.arm,
                        count(d.prompt_tokens),
                        number(d.kl_mean),
                        number(d.kl_p99),
                        number(d.kl_max),
                        percent(d.top1),
                        number(d.perplexity),
                        f"{number(d.identical_tokens)} of {count(d.greedy_tokens)}",
                        percent(d.quantized_share),
                    )
                    for d in fidelity.results
                ),
            )
        )
    if fidelity.costs:
        formats = tuple(dict.fromkeys(name for cost in fidelity.costs for name in cost.share))
        tables.append(
            Table(
                "Cost: prefill arithmetic of the linear layers by format",
                ("Arm", *formats, "Mean bits of a weight"),
                tuple(
                    (
                        cost.arm,
                        *(percent(cost.share.get(name, 0.0)) for name in formats),
                        number(cost.bits),
                    )
                    for cost in fidelity.costs
                ),
            )
        )
    if fidelity.texts:
        tables.append(Table("Texts", ("Text",), tuple((text,) for text in fidelity.texts), True))
    return tuple(tables)
