"""What speed measurements mean, in words: faster, slower or neither, and where."""

from __future__ import annotations

from collections.abc import Sequence

from mixquant.report.bench_groups import Group
from mixquant.report.derived import (
    Speedup,
    arms_of,
    condition,
    higher_is_better,
    sign_of,
    unquantized,
)
from mixquant.report.names import device_in_words, model_name
from mixquant.report.text import clauses, count, listed, quantity, times
from mixquant.report.verdicts import in_words, no_difference, times_range
from mixquant.results import BASELINE, Bench, Measurement

# What the verdict speaks of, if it was measured: the metric that shows the phase best.
_PREFILL = (("length", "ttft"), ("concurrency", "ttft"), ("agent", "ttft"), ("length", "prefill"))
_DECODE = (("batch", "tpot"), ("length", "tpot"), ("concurrency", "tpot"), ("agent", "tpot"))
_MAX_SENTENCES = 4
_WHAT = {
    "ttft": "How long a request waits for its first token.",
    "tpot": "How long each further token takes.",
    "prefill": "How fast prompts are read.",
    "output": "How many tokens per second the server writes.",
    "batch_of_16": "How long it takes until all requests are answered.",
}
_ABOVE = {
    "ttft": "the first token comes sooner than with BF16",
    "tpot": "each further token takes less time than with BF16",
    "prefill": "prompts are read faster than with BF16",
    "output": "the server writes more tokens per second than with BF16",
}


def _exceptions(group: Group, ratios: Sequence[Speedup]) -> str:
    """Where an arm is slower or no different; empty if that is so everywhere, or nowhere."""
    if len({r.sign for r in ratios}) == 1:
        return ""
    said = []
    for sign, words in ((-1, "slower at"), (0, "no clear difference at")):
        xs = [group.x(r.measurement) for r in ratios if r.sign == sign]
        if xs:
            said.append(f"{words} {_conditions(group, xs)}")
    return "; ".join(said)


def verdict(bench: Bench, groups: Sequence[Group]) -> str:
    """Prefill and decode of the main arm against BF16, with where that holds, and the other arms.

    Empty if there is no group: turns have a verdict of their own.
    """
    if not groups:
        return ""
    model, device = model_name(bench.model), device_in_words(bench.environment)
    prefill, decode = (_first(groups, wanted) for wanted in (_PREFILL, _DECODE))
    arms = arms_of(r.arm for group in (prefill, decode) if group for r in group.ratios)
    if not arms:
        return _without_ratios(bench, model, device)
    main = "mixquant" if "mixquant" in arms else arms[0]
    said: list[str] = []
    for phase, group in (("Prefill", prefill), ("Decode", decode)):
        own = group.ratios_of(main) if group else []
        if group is None or not own:
            continue
        where = _preposition(group, [group.x(r.measurement) for r in own])
        subject = phase
        if not said:
            subject, where = f"{phase} of {model} with {main}", f"{where} on {device}"
        sentence = in_words(subject, [r.ratio for r in own], where, {r.sign for r in own})
        but = _exceptions(group, own)
        said.append(f"{sentence} ({but})." if but else f"{sentence}.")
    for arm in arms:
        parts = [
            f"{phase} {times_range([r.ratio for r in own])}"
            for phase, group in (("prefill", prefill), ("decode", decode))
            if group and arm != main and (own := group.ratios_of(arm))
        ]
        if parts:
            said.append(f"For comparison, {arm}: {listed(parts)} as fast as BF16.")
    return " ".join(said)


def meaning(group: Group) -> str:
    """What the group's plot says: how to read it, and where each arm is faster or slower."""
    what = _WHAT.get(group.metric, "")
    plotted_as_ratio = len(group.xs) > 1 and bool(group.ratios)
    if plotted_as_ratio:
        better = _ABOVE.get(group.metric, "the arm is faster than with BF16")
        opening = f"Above the dashed line, {better}."
    elif group.unit == "share":
        opening = "How much of the prompts an arm computed in its prefill format."
    else:
        opening = f"{what} {'More' if higher_is_better(group.unit) else 'Less'} is better.".lstrip()
    statements: dict[str, list[str]] = {}
    arms = arms_of(r.arm for r in group.ratios)
    for arm in arms:
        statements.setdefault(_statement(group, arm), []).append(arm)
    said: list[str] = [
        f"{listed(who)} {'is' if len(who) == 1 else 'are'} {what}"
        for what, who in statements.items()
    ]
    if not group.ratios and len(group.arms) > 1 and group.unit != "share":
        said = _best(group)
    said += [_against("mixquant", group, arm) for arm in arms if "mixquant" in arms]
    said = [sentence for sentence in said if sentence]
    if len(said) > _MAX_SENTENCES:
        said = [*said[:_MAX_SENTENCES], "The table has the other arms"]
    closing = "".join(f" {sentence}." for sentence in said)
    if group.metric == "tpot" and "mixquant" in arms:
        closing += " mixquant decodes in BF16, so no gain is expected here."
    spread = ""
    if any(m.lowest is not None and m.highest is not None for m in group.results):
        spread = " Thin bars span the lowest to the highest value."
    return opening + closing + spread


def numbers(group: Group) -> str:
    """The plot's values in a sentence, for those who do not see it."""
    said = []
    for arm in group.arms:
        own = group.ratios_of(arm)
        if own:
            said.append(f"{arm} {_times_range(own)}{_most(group, own)}")
        elif not group.ratios:
            values = [quantity(m.value, m.unit) for m in group.of(arm)]
            said.append(f"{arm} {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else ""))
    conditions = f" ({group.condition})" if group.condition else ""
    opening = f"Speed against {BASELINE}" if group.ratios else "Values"
    return f"{opening}{conditions}: {clauses(said)}."


def notes(bench: Bench) -> tuple[str, ...]:
    """A warning for each arm that quantized nothing somewhere: no ratio is shown there."""
    if BASELINE not in {m.arm for m in bench.results}:
        return ()  # no ratios that the reader could miss
    idle = unquantized(bench.results)
    thresholds = {arm.name: (arm.recipe or {}).get("min_prefill_tokens") for arm in bench.arms}
    said = []
    for arm in dict.fromkeys(name for name, _ in sorted(idle, key=str)):
        found = [m for m in bench.results if (m.arm, condition(m)) in idle and m.arm == arm]
        conditions = list(dict.fromkeys(_condition(m) for m in sorted(found, key=_size)))
        why = ""
        threshold = thresholds.get(arm)
        if isinstance(threshold, int) and all(_size(m) < threshold for m in found):
            why = f": fewer tokens than its threshold, {count(threshold)}"
        shown = listed(conditions[:4]) + (
            f" and {len(conditions) - 4} more" if len(conditions) > 4 else ""
        )
        said.append(
            f"{arm} quantized no prompt token for {shown}{why}. The page counts no speed-up there."
        )
    return tuple(said)


def _size(m: Measurement) -> int:
    return m.tokens


def _condition(m: Measurement) -> str:
    if m.workload == "agent":
        return f"the agent trace, {count(m.concurrency)} at a time"
    if m.cached is not None:
        return f"turns of {count(m.tokens)} new tokens"
    at_once = f", {count(m.concurrency)} at a time" if m.concurrency > 1 else ""
    return f"prompts of {count(m.tokens)} tokens{at_once}"


def _without_ratios(bench: Bench, model: str, device: str) -> str:
    arms = arms_of(arm.name for arm in bench.arms)
    if BASELINE not in {m.arm for m in bench.results}:
        return (
            f"Speed of {model} on {device}: {listed(arms)}. "
            f"There is no arm {BASELINE} to compare with, so the plots show values, not ratios."
        )
    return f"Speed of {model} on {device}: {listed(arms)}."


def _first(groups: Sequence[Group], wanted: Sequence[tuple[str, str]]) -> Group | None:
    """The first that was measured; of several prompt lengths or concurrencies, the most plotted."""
    for kind in wanted:
        found = [g for g in groups if (g.workload, g.metric) == kind and g.ratios]
        if found:
            return max(found, key=lambda group: len(group.xs))
    return None


def _statement(group: Group, arm: str) -> str:
    """``faster than BF16 at 2,048 tokens and slower at 8,192``, without the ratios."""
    own = group.ratios_of(arm)
    throughout = " throughout" if len(own) > 1 else ""
    words = {
        1: "faster than BF16",
        -1: "slower than BF16",
        0: no_difference([r.ratio for r in own if r.sign == 0]),
    }
    xs = {sign: [group.x(r.measurement) for r in own if r.sign == sign] for sign in words}
    said = [
        word + (throughout if len(xs[sign]) == len(own) else f" at {_conditions(group, xs[sign])}")
        for sign, word in words.items()
        if xs[sign]
    ]
    best = max(own, key=lambda r: r.ratio)
    if len(own) > 1 and len(xs[1]) == len(own):
        return f"{said[0]}, most at {_conditions(group, [group.x(best.measurement)])}"
    return listed(said)


def _best(group: Group) -> list[str]:
    """Which arm is best where, of those that have no ratio."""
    best: dict[str, list[int]] = {}
    for x in group.xs:
        here = [m for m in group.results if group.x(m) == x and m.value > 0]
        here.sort(key=lambda m: m.value, reverse=higher_is_better(group.unit))
        if len(here) > 1:
            is_clear = sign_of(here[0].value / here[1].value) != 0
            best.setdefault(here[0].arm if is_clear else "", []).append(x)
    throughout = " throughout" if len(group.xs) > 1 else ""
    return [
        (f"{arm} is best" if arm else "There is no clear difference")
        + (throughout if len(best) == 1 else f" at {_conditions(group, xs)}")
        for arm, xs in best.items()
    ]


def _against(main: str, group: Group, arm: str) -> str:
    """Whether another arm is ahead of the main one, where both were measured."""
    mains = {group.x(r.measurement): r.ratio for r in group.ratios_of(main)}
    ahead = {
        x: sign_of(r.ratio / mains[x])
        for r in group.ratios_of(arm)
        if (x := group.x(r.measurement)) in mains and mains[x] > 0
    }
    if arm == main or not ahead:
        return ""
    throughout = " throughout" if len(ahead) > 1 else ""
    for sign, words in ((1, "ahead of"), (-1, "behind"), (0, "level with")):
        if set(ahead.values()) == {sign}:
            return f"{arm} is {words} {main}{throughout}"
    said = [
        f"{words} {main} at {_conditions(group, xs)}"
        for sign, words in ((1, "ahead of"), (-1, "behind"))
        if (xs := [x for x, found in ahead.items() if found == sign])
    ]
    return f"{arm} is {listed(said)}"


def _conditions(group: Group, xs: Sequence[int]) -> str:
    if group.workload == "length":
        return listed([count(x) for x in xs]) + " tokens"
    said = listed([count(x) for x in xs])
    return f"batch size {said}" if group.workload == "batch" else f"{said} at a time"


def _preposition(group: Group, xs: Sequence[int]) -> str:
    where = group.at(*xs)
    if group.workload == "agent":
        return f"in the agent trace, {where}"
    return f"at {where}" if group.workload in ("length", "batch") else f"with {where}"


def _times_range(own: Sequence[Speedup]) -> str:
    low, high = (times(f(r.ratio for r in own)) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def _most(group: Group, own: Sequence[Speedup]) -> str:
    if len(own) < 2 or len({times(r.ratio) for r in own}) == 1:
        return ""
    best = max(own, key=lambda r: r.ratio)
    return f", most at {group.at(group.x(best.measurement))}"
