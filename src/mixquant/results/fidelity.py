"""The results file of `mixquant fidelity`."""

from __future__ import annotations

from typing import Literal

from mixquant.results.base import Arm, Count, Environment, Record


class Position(Record):
    """How far an arm is from BF16 at answer tokens of this distance from the prompt's end.

    Attributes:
        first: the first answer token of this group, counted from 1. It ends before the next group.
        kl_mean: nats per token.
        top1: share of positions where the likeliest token is BF16's.
    """

    first: Count
    kl_mean: float
    top1: float


class Divergence(Record):
    """One arm at one prompt length, against BF16, over all texts.

    Attributes:
        arm: the name of the arm.
        prompt_tokens: of each text.
        answers: teacher-forced continuations.
        answer_tokens: of all of them together.
        kl_mean: KL(BF16, arm) in nats per token.
        kl_p99: what 99 % of the positions stay below.
        kl_max: the largest.
        top1: share of positions where the likeliest token is BF16's.
        perplexity: of the texts' own continuations.
        identical_tokens: tokens of the greedy answer before it first differs from BF16's; the mean.
        greedy_tokens: length of the greedy answers.
        quantized_share: the share of the computed prompt tokens that mixquant quantized.
        by_position: the same by distance from the prompt's end.
    """

    arm: str
    prompt_tokens: Count
    answers: Count
    answer_tokens: Count
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float
    identical_tokens: float
    greedy_tokens: Count
    quantized_share: float
    by_position: tuple[Position, ...]


class Cost(Record):
    """How an arm's prefill arithmetic in linear layers is divided among formats.

    Attributes:
        arm: the name of the arm.
        share: by format, of the multiply-adds; sums to 1.
        bits: mean bits of a multiplied weight; reports plot fidelity against it.
    """

    arm: str
    share: dict[str, float]
    bits: float


class Fidelity(Record):
    """What `mixquant fidelity` writes.

    Attributes:
        kind: ``fidelity``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        engine: what ran the model.
        texts: names of the texts.
        arms: in the order in which they ran.
        costs: one for each arm of which mixquant knows the formats.
        results: one for each arm and prompt length.
    """

    kind: Literal["fidelity"] = "fidelity"
    environment: Environment
    command: str
    model: str
    engine: Literal["transformers", "vllm"]
    texts: tuple[str, ...]
    arms: tuple[Arm, ...]
    costs: tuple[Cost, ...]
    results: tuple[Divergence, ...]
