"""A tuned recipe: the frontier that the search predicted, and the recipes that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.axes import Point, Series
from mixquant.report.names import model_name
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import scatter
from mixquant.report.style import looks
from mixquant.report.text import clauses, count, number, percent
from mixquant.results import Predicted, Tried, Tuning

TUNED = "tuned"
_MAX_POINTS = 15  # of the frontier, as numbers


def section(tuning: Tuning) -> Section:
    """What a tuning file shows: divergence against cost, and all figures as a table."""
    return Section(
        title="Tuning",
        verdict=_verdict(tuning),
        key_figures=_key_figures(tuning),
        notes=_notes(tuning),
        panels=tuple(_against_cost(tuning)),
        tables=_tables(tuning),
    )


def budget(tuning: Tuning) -> str:
    """The budget in words."""
    match tuning.budget:
        case "kl":
            return f"at most {number(tuning.at_most)} nats per token from BF16"
        case "recovered":
            return f"at least {percent(tuning.at_most)} of the loss recovered"
        case "bits":
            return f"at most {number(tuning.at_most)} bits"


def _tuned(tuning: Tuning) -> Tried | None:
    return next((one for one in tuning.tried if one.arm == TUNED), None)


def _verdict(tuning: Tuning) -> str:
    one = _tuned(tuning)
    if one is None or one.time is None or one.held_out is None:
        return ""
    said = (
        f"For {budget(tuning)}, the cheapest recipe found for {model_name(tuning.model)} on "
        f"{tuning.target} takes {number(one.time)} times the prefill time of the fastest format "
        f"everywhere, by the cost model at {count(tuning.cost_tokens)} tokens. On texts that the search "
        f"did not see{_checked(tuning)} the recipe is {number(one.held_out)} nats per token from BF16"
    )
    if one.recovered is not None:
        said += f" and wins back {percent(one.recovered)} of what quantizing both phases loses"
    return f"{said}."


def _checked(tuning: Tuning) -> str:
    """The length of the prompts that decided, if it is another than that of those searched on."""
    if tuning.check_tokens in (None, tuning.prompt_tokens):
        return ""
    return f", with prompts of {count(tuning.check_tokens)} tokens,"


def _key_figures(tuning: Tuning) -> tuple[KeyFigure, ...]:
    one = _tuned(tuning)
    if one is None:
        return ()
    figures = []
    if one.recovered is not None:
        figures.append(
            KeyFigure(percent(one.recovered), "recovered, on texts that the search did not see")
        )
    if one.time is not None:
        figures.append(KeyFigure(number(one.time), "prefill time next to plain, by the cost model"))
    return tuple(figures)


def _notes(tuning: Tuning) -> tuple[str, ...]:
    ratios = [
        one.searched / one.predicted for one in tuning.tried if one.predicted and one.searched
    ]
    if not ratios:
        return ()
    said = (
        "The search estimates effects to first order. Measured divergences are "
        f"{number(min(ratios))} to {number(max(ratios))} times the predicted ones"
    )
    if tuning.rank is not None:
        said += f"; their rank correlation is {number(tuning.rank)}"
    return (f"{said}.",)


def _against_cost(tuning: Tuning) -> list[Panel]:
    shown = [
        (one, one.time, one.held_out if one.held_out is not None else one.searched)
        for one in tuning.tried
    ]
    points = [(one.arm, time, kl) for one, time, kl in shown if time is not None and kl is not None]
    if not points or not tuning.frontier:
        return []
    looked = looks([arm for arm, _, _ in points])
    dearest = 1.5 * max(time for _, time, _ in points)
    front = [Point(one.time, one.kl) for one in tuning.frontier if one.time <= dearest]
    title = f"Distance from BF16 against prefill time, {count(tuning.prompt_tokens)} prompt tokens"
    said = [f"{arm} {number(kl)} at {number(time)}" for arm, time, kl in points]
    return [
        Panel(
            title,
            "Lower is nearer to BF16, further left is cheaper. The dashed line is the frontier that "
            "the search predicts from the sensitivities. The other points were measured: on the texts "
            "held out, or, where a recipe was not measured on those, on the texts searched on.",
            f"KL in nats per token by time next to plain: {clauses(said)}.",
            partial(
                scatter,
                series=[Series(arm, looked[arm], (Point(time, kl),)) for arm, time, kl in points],
                front=front,
                x_label="Time of prefill's products, next to plain",
                y_label="KL from BF16, nats per token",
                front_name="predicted frontier",
            ),
            Table(
                "The predicted frontier" + ", in part" * (len(tuning.frontier) > _MAX_POINTS),
                ("Time next to plain", "Bits", "KL predicted, nats per token"),
                tuple(
                    (number(one.time), number(one.bits), number(one.kl))
                    for one in _some(tuning.frontier)
                ),
            ),
        )
    ]


def _some(frontier: Sequence[Predicted]) -> list[Predicted]:
    """Points from all over the frontier, as many as fit on a printed page, first and last among them."""
    most = min(len(frontier), _MAX_POINTS)
    last = len(frontier) - 1
    return [frontier[round(last * place / max(most - 1, 1))] for place in range(most)]


def _tables(tuning: Tuning) -> tuple[Table, ...]:
    def shown(value: float | None) -> str:
        return "–" if value is None else number(value)

    return (
        Table(
            "Recipes measured: KL from BF16, nats per token",
            (
                "Arm",
                "Time next to plain",
                "Bits",
                "Predicted",
                "Texts searched on",
                "Texts held out",
                "Recovered",
            ),
            tuple(
                (
                    one.arm,
                    shown(one.time),
                    number(one.bits),
                    shown(one.predicted),
                    shown(one.searched),
                    shown(one.held_out),
                    "–" if one.recovered is None else percent(one.recovered),
                )
                for one in tuning.tried
            ),
        ),
        Table("Texts searched on", ("Text",), tuple((text,) for text in tuning.texts), True),
        Table("Texts held out", ("Text",), tuple((text,) for text in tuning.held_out), True),
    )
