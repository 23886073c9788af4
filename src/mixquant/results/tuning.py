"""The results file of `mixquant tune`."""

from __future__ import annotations

from typing import Literal

from mixquant.results.base import Arm, Count, Environment, Record


class Tried(Record):
    """A recipe that was measured. Divergences in nats per token of the texts' own continuations.

    Attributes:
        arm: the name of the arm.
        time: of prefill's products by the cost model, relative to ``plain``; None for ``quantized``,
            whose decode is quantized, too.
        bits: mean bits of a multiplied weight.
        predicted: KL(BF16, arm) from the sensitivities; None for ``quantized``.
        searched: the same as measured on the texts of the search.
        held_out: as measured on the texts that decide; None if it was not.
        recovered: the share that the arm wins back of what quantizing both phases loses, on the texts
            that decide; None if it was not measured.
    """

    arm: str
    time: float | None
    bits: float
    predicted: float | None
    searched: float | None
    held_out: float | None
    recovered: float | None


class Predicted(Record):
    """A point of the frontier that the search found.

    Attributes:
        time: of prefill's products by the cost model, relative to ``plain``.
        bits: mean bits of a multiplied weight.
        kl: predicted, in nats per token.
    """

    time: float
    bits: float
    kl: float


class Tuning(Record):
    """What `mixquant tune` writes: the frontier, and what was measured.

    Attributes:
        kind: ``tuning``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        target: what the recipe is for.
        rates: of products by format, in any unit.
        budget: ``kl``, ``recovered`` or ``bits``.
        at_most: the budget's value. It is a lower limit for ``recovered``.
        prompt_tokens: of the passages searched on.
        check_tokens: of the passages that decide. None in files older than this field: as many.
        cost_tokens: of the prompt whose prefill the cost model times.
        texts: names of those searched on.
        held_out: names of those that decide.
        arms: ``quantized`` (both phases in the fastest format), ``plain`` (prefill alone), ``plain 4/6``
            (with the better block scale), candidates, and ``tuned``, the recipe that was written.
        tried: one for each arm.
        frontier: ascending in time, or in bits for that budget.
        rank: Spearman's correlation of predicted and measured divergence over the arms; None for
            fewer than three.
    """

    kind: Literal["tuning"] = "tuning"
    environment: Environment
    command: str
    model: str
    target: str
    rates: dict[str, float]
    budget: Literal["kl", "recovered", "bits"]
    at_most: float
    prompt_tokens: Count
    check_tokens: Count | None = None
    cost_tokens: Count
    texts: tuple[str, ...]
    held_out: tuple[str, ...]
    arms: tuple[Arm, ...]
    tried: tuple[Tried, ...]
    frontier: tuple[Predicted, ...]
    rank: float | None
