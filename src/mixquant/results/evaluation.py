"""The results file of `mixquant evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from mixquant.results.base import Arm, Count, Environment, Record


class Score(Record):
    """One arm on one benchmark; shares, not percent. The interval holds 95 %.

    Attributes:
        benchmark: its name; of a group, NAME/GROUP.
        arm: the name of the arm.
        score: the mean over items of the mean over their seeds.
        low: end of the interval.
        high: end of the interval.
        items: how many were asked.
        seeds: how often each was asked.
        failed: requests that got no answer in the end; they count as wrong.
        unjudged: answers that no judge gave a verdict on; they do not count.
        unextracted: answers that hold nothing to score (no letter, no call); they count as wrong.
        prompt_tokens: the sum over an answer's requests; the mean. None if no server reported it.
        answer_tokens: of an answer with its reasoning; the mean. None if no server reported it.
    """

    benchmark: str
    arm: str
    score: float
    low: float
    high: float
    items: Count
    seeds: Count
    failed: Count
    unjudged: Count = 0
    unextracted: Count = 0
    prompt_tokens: float | None = None
    answer_tokens: float | None = None


class Difference(Record):
    """An arm minus ``versus``, paired by item and seed. The interval holds 95 %.

    Attributes:
        benchmark: its name.
        arm: the name of the arm.
        versus: the name of the other arm.
        difference: share.
        low: end of the interval.
        high: end of the interval.
    """

    benchmark: str
    arm: str
    versus: str
    difference: float
    low: float
    high: float


class Recovery(Record):
    """How much of the loss of quantizing everything an arm wins back.

    Attributes:
        benchmark: its name, or ``mean``.
        arm: the name of the arm.
        recovery: (arm - quantized) / (bf16 - quantized); None if quantizing everything lost nothing.
    """

    benchmark: str
    arm: str
    recovery: float | None


class Evaluation(Record):
    """What `mixquant evaluate` writes.

    Attributes:
        kind: ``evaluation``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        arms: in the order in which they ran.
        settings: of sampling, cutting, judging.
        scores: one for each arm and benchmark.
        differences: one for each pair of arms and benchmark.
        recoveries: one for each arm and benchmark, and for the means.
        subscores: of a benchmark's groups.
    """

    kind: Literal["evaluation"] = "evaluation"
    environment: Environment
    command: str
    model: str
    arms: tuple[Arm, ...]
    settings: dict[str, Any]
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    recoveries: tuple[Recovery, ...]
    subscores: tuple[Score, ...] = ()
