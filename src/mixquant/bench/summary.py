"""From answers to figures: medians, their ranges, and ratios between arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from mixquant.bench.counts import Counts
from mixquant.bench.generator import Answer
from mixquant.bench.workloads import LoadPoint
from mixquant.results import BASELINE, Measurement

TIMES = ("ttft", "tpot", "itl", "e2e")


def measurements(
    arm: str, point: LoadPoint, runs: Sequence[Sequence[Answer]], counts: Counts
) -> list[Measurement]:
    """The figures of one arm at one point.

    Times are of all requests of all runs, ``itl`` of all their tokens; rates are of whole runs:
    ``output`` and ``total`` tokens per second from the first request to the last token, ``prefill``
    prompt tokens per second until the last request's first token, where all requests begin at once.

    Args:
        runs: what was answered in each, without the warm-up.
        counts: the server's, of these runs.
    """
    answers = [answer for run in runs for answer in run]
    ms = {
        "ttft": [1e3 * answer.ttft for answer in answers],
        "tpot": [1e3 * answer.tpot for answer in answers if answer.tpot is not None],
        "itl": [1e3 * gap for answer in answers for gap in answer.itl],
        "e2e": [1e3 * answer.e2e for answer in answers],
    }
    rates = {
        "output": [sum(a.output_tokens for a in run) / _seconds(run) for run in runs],
        "total": [
            sum(a.prompt_tokens + a.output_tokens for a in run) / _seconds(run) for run in runs
        ],
    }
    if point.workload in ("length", "batch"):
        rates["prefill"] = [
            sum(a.prompt_tokens for a in run) / _prefill_seconds(run) for run in runs
        ]
    shares = {"quantized": counts.quantized_share, "cached": counts.cached_share}

    def figure(metric: str, unit: str, values: Sequence[float]) -> Measurement:
        spread = (min(values), max(values)) if len(values) > 1 else (None, None)
        return Measurement(
            arm=arm,
            metric=metric,
            workload=point.workload,
            tokens=point.tokens,
            cached=point.cached,
            concurrency=point.concurrency,
            value=median(values),
            unit=unit,
            lowest=spread[0],
            highest=spread[1],
        )

    found = [figure(metric, "ms", values) for metric, values in ms.items() if values]
    found += [figure(metric, "tok/s", values) for metric, values in rates.items()]
    found += [figure(m, "share", [value]) for m, value in shares.items() if value is not None]
    return found


def _seconds(run: Sequence[Answer]) -> float:
    return max(a.start + a.e2e for a in run) - min(a.start for a in run)


def _prefill_seconds(run: Sequence[Answer]) -> float:
    return max(a.start + a.ttft for a in run) - min(a.start for a in run)


def reference_of(arms: Iterable[str]) -> str:
    """The arm that ratios compare with: bf16 if there is one, else the first."""
    names = list(arms)
    return BASELINE if BASELINE in names else names[0]


# Workload, tokens, cached tokens, concurrency.
Place = tuple[str, int, int | None, int]


def place_of(figure: Measurement) -> Place:
    """The point at which something was measured."""
    return figure.workload, figure.tokens, figure.cached, figure.concurrency


def gains(found: Iterable[Measurement]) -> dict[tuple[str, Place, str], float]:
    """How many times as fast as the reference each figure is; above 1 is better.

    Returns:
        By arm, place and metric; without shares, without what the reference does not have, and
        without points where an arm quantized nothing (`nothing_quantized`): it did there what the
        reference does, so a ratio is noise.
    """
    found = list(found)
    nothing = nothing_quantized(found)
    figures = [figure for figure in found if figure.unit != "share"]
    if not figures:
        return {}
    reference = reference_of(dict.fromkeys(figure.arm for figure in figures))
    by_key = {(f.arm, place_of(f), f.metric): f.value for f in figures}
    gained = {}
    for (arm, place, metric), value in by_key.items():
        base = by_key.get((reference, place, metric))
        unquantized = arm != reference and (arm, place) in nothing
        if base and value and not unquantized:
            gained[arm, place, metric] = base / value if metric in TIMES else value / base
    return gained


def crossover(found: Iterable[Measurement], arm: str) -> int | None:
    """From how many new tokens on an arm answers no later than the reference, whatever is cached.

    Returns:
        The fewest of the turns that were measured from which on that holds; None if it does not hold
        for the longest, or there are no turns where the arm quantized something.
    """
    slowest: dict[int, float] = {}
    for (name, (workload, tokens, _, _), metric), gain in gains(found).items():
        if (name, workload, metric) == (arm, "turns", "ttft"):
            slowest[tokens] = min(gain, slowest.get(tokens, gain))
    least = None
    for tokens in sorted(slowest, reverse=True):
        if slowest[tokens] < 1:
            break
        least = tokens
    return least


def nothing_quantized(found: Iterable[Measurement]) -> set[tuple[str, Place]]:
    """The points at which an arm read prompts and quantized none of their tokens.

    Returns:
        By arm and place. Arms that do not count rows are not among them.
    """
    return {
        (figure.arm, place_of(figure))
        for figure in found
        if figure.metric == "quantized" and figure.value == 0
    }
