"""The results file of `mixquant compare`."""

from __future__ import annotations

from typing import Any, Literal

from mixquant.results.base import Count, Environment, Record


class ComparedArm(Record):
    """One arm of `mixquant compare`: its cost and its answer. Times in seconds.

    Attributes:
        name: ``bf16``, ``attention``, ``quantized`` or ``mixquant``.
        device: of the model.
        compute_dtype: of precise products: the faster of bfloat16 and float32 for ``bf16``.
        prefill_tokens: read in all turns; tokens in the KV cache are not read again.
        quantized_prefill_tokens: of these, multiplied in the prefill format.
        ttft_s: time from the prompt to the logits of the first answer token, summed over the turns.
        ttft_s_per_turn: the same of each turn; the median of the rounds.
        prefill_tokens_per_s: ``prefill_tokens`` over ``ttft_s``.
        tpot_s: median over all answer tokens except the first of each answer; None if there are none.
        kl_mean: KL(reference, arm) in nats per token, teacher-forced on the reference.
        top1_agreement: share of answer positions where the likeliest token is the reference's.
        extra_bytes: memory of the quantized copies.
        text: the arm's own greedy answer to the last question. Earlier answers are the reference's.
    """

    name: str
    device: str
    compute_dtype: str
    prefill_tokens: Count
    quantized_prefill_tokens: Count
    ttft_s: float
    ttft_s_per_turn: tuple[float, ...]
    prefill_tokens_per_s: float
    tpot_s: float | None
    kl_mean: float
    top1_agreement: float
    extra_bytes: Count
    text: str


class Comparison(Record):
    """What `mixquant compare` writes: the arms side by side.

    Attributes:
        kind: ``comparison``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        device: ``cpu`` or ``cuda``.
        device_name: as in the environment.
        threads: of the CPU.
        format: of the recipe's other projections, if it names several.
        kernel: what multiplies quantized rows.
        native: whether that kernel multiplies in the format, or emulates it.
        recipe: with everything decided.
        attention: what quantized rows attend in, in words; empty if it is not known.
        workload: what the arms read, in words.
        prompt_tokens_per_turn: tokens that are new in each turn.
        answer_tokens_per_turn: of the reference.
        prefill_rounds: how often each arm read a prompt.
        probed_prefill_s: time to read the first prompt's beginning, by dtype; ``bf16`` takes the faster.
        answers: the reference's.
        arms: in the order of the table.
    """

    kind: Literal["comparison"] = "comparison"
    environment: Environment
    command: str
    model: str
    device: str
    device_name: str
    threads: Count
    format: str
    kernel: str
    native: bool
    recipe: dict[str, Any]
    attention: str = ""
    workload: str
    prompt_tokens_per_turn: tuple[Count, ...]
    answer_tokens_per_turn: tuple[Count, ...]
    prefill_rounds: Count
    probed_prefill_s: dict[str, float]
    answers: tuple[str, ...]
    arms: tuple[ComparedArm, ...]
