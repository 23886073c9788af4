"""The results file of `mixquant bench`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from mixquant.results.base import Arm, Count, Environment, Record


class Measurement(Record):
    """One figure of one arm: the median, and how far single values were from it.

    Attributes:
        arm: the name of the arm.
        metric: ``ttft``, ``tpot``, ``itl``, ``e2e`` (ms); ``prefill``, ``output``, ``total`` (tok/s);
            ``quantized``, ``cached`` (share); ``launches`` of one pass (calls).
        workload: ``length``, ``batch``, ``concurrency``, ``turns`` or ``agent``.
        tokens: of each prompt, without those ``cached``; for the agent trace, the mean.
        cached: tokens of a turn's prompt that the KV cache holds already; None if there are no turns.
        concurrency: requests, or sessions of the agent trace, at a time.
        value: the median.
        unit: of the three numbers.
        lowest: the lowest single value.
        highest: the highest single value.
    """

    arm: str
    metric: str
    workload: str = "length"
    tokens: Count
    cached: Count | None = None
    concurrency: Count
    value: float
    unit: str
    lowest: float | None = None
    highest: float | None = None

    @model_serializer(mode="wrap")
    def _without_absent_cached(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``cached`` where there is none: earlier versions refuse a field they do not know."""
        values: dict[str, Any] = handler(self)
        if values["cached"] is None:
            del values["cached"]
        return values


class Piece(Record):
    """The share of one kind of work in a measured time, from a profile.

    Attributes:
        arm: the name of the arm.
        tokens: of the prompt.
        kind: ``linear``, ``attention``, ``quantize``, ``norm`` or ``other``.
        ms: time on the GPU.
    """

    arm: str
    tokens: Count
    kind: str
    ms: float


class Bench(Record):
    """What `mixquant bench` writes.

    Attributes:
        kind: ``bench``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        arms: in the order in which they ran.
        settings: lengths of answers, repeats, the seed of the prompts.
        results: one for each arm, metric and workload.
        breakdown: where the time goes, if it was profiled.
    """

    kind: Literal["bench"] = "bench"
    environment: Environment
    command: str
    model: str
    arms: tuple[Arm, ...]
    settings: dict[str, Any] = Field(default_factory=dict)
    results: tuple[Measurement, ...]
    breakdown: tuple[Piece, ...] = ()
