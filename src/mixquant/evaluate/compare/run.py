"""The main job: one conversation in a few arms, with what quantizing costs and gains.

``bf16`` is the model without mixquant. It answers greedily, and its answers are the reference.
``mixquant`` quantizes prefill, ``quantized`` both phases. ``attention`` quantizes nothing: the rows that
``mixquant`` quantizes attend in our kernel for CPUs, in BF16. It is left out where that is not the
faster one. All arms read the same prompts and are
made to write the same answers, the reference's, so that they do the same work and each position's
distribution can be held against the reference's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.models import Checkpoint, load_model
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import PrepareError, prepare, summary
from mixquant.engines.transformers.attention import attends_faster_in_bf16
from mixquant.evaluate.compare.timed_arm import TimedArm, type_name
from mixquant.evaluate.compare.workload import Workload
from mixquant.evaluate.divergence import divergence
from mixquant.results import ComparedArm, Comparison, Environment

ARMS = ("bf16", "attention", "quantized", "mixquant")

# A prompt is read this often by each arm, in turns, and the median counts: other work on the
# machine then hits all arms alike.
PREFILL_ROUNDS = 2

# Of each answer, so many steps are timed: all arms take them in turns. The others read the rest of the
# answer in one pass, which tells its distributions as well and takes a fraction of the time.
TIMED_STEPS = 6

# The type of the reference is chosen by prefills of so much of the first prompt: enough to tell BF16
# from FP32, and a fraction of the time. The faster round counts: the first one sets kernels up, and
# other work on the machine may fall on either.
PROBE_TOKENS = 512
PROBE_ROUNDS = 2

Progress = Callable[[str, float], None]


def compare(
    checkpoint: Checkpoint,
    workload: Workload,
    recipe: Recipe,
    *,
    arms: Sequence[str] = ARMS,
    max_new_tokens: int = 24,
    command: str = "",
    progress: Progress = lambda doing, share: None,
) -> Comparison:
    """Runs the workload in the arms.

    Args:
        arms: those to report, in any order. ``bf16`` always runs: it is the reference.
        max_new_tokens: per answer; the reference may end earlier.
        command: what the user typed, to stand in the result.
        progress: is told what is being done, and the share that is done.

    Raises:
        ModelError: the model cannot be loaded, or its context is too short for the workload.
        PrepareError, RecipeError: the model cannot be prepared so, or none of the arms runs here.
    """
    needed = workload.prompt_tokens + workload.turns * max_new_tokens
    if checkpoint.context is not None and needed > checkpoint.context:
        raise ModelError(
            f"the conversation is too long for {checkpoint.name}: {workload.prompt_tokens} prompt "
            f"tokens and {workload.turns} answers of {max_new_tokens} exceed its context of "
            f"{checkpoint.context} tokens"
        )
    opening = workload.prompt(0)

    progress("Loading the model", 0.0)
    baseline, probed = _baseline(checkpoint, opening, progress)
    running = [TimedArm("bf16", baseline)]
    prepared = None
    if set(arms) != {"bf16"}:
        progress("Quantizing, and compiling the kernels", 0.17)
        prepared = prepare(load_model(checkpoint, torch.bfloat16), recipe)
        running += [
            TimedArm(
                name,
                prepared,
                quantize_all=name == "quantized",
                only_attention=name == "attention",
            )
            for name in ("mixquant", "quantized", "attention")
            if name in arms and (name != "attention" or attends_faster_in_bf16(prepared))
        ]
        if not any(arm.name in arms for arm in running):
            others = ", ".join(name for name in ARMS if name not in arms)
            raise PrepareError(
                "the arm attention runs only on CPUs where mixquant's attention is faster than "
                f"PyTorch's in BF16, too, and not on this machine; ask for one of {others}"
            )
        for number, arm in enumerate(running[1:]):
            progress("Compiling and warming up", 0.2 + 0.03 * number)
            arm.warm_up(opening)

    answers, wanted = _play(running, workload, max_new_tokens, progress)
    reference = running[0]
    device = baseline.device
    recipe_used = summary(prepared).recipe if prepared is not None else recipe
    used = _format_used(prepared)
    return Comparison(
        environment=Environment.here(),
        command=command,
        model=checkpoint.name,
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        format=used[0],
        kernel=used[1],
        native=used[2],
        recipe=recipe_used.to_dict(),
        attention=_attention(prepared),
        workload=workload.description,
        prompt_tokens_per_turn=tuple(reference.prompt_tokens),
        answer_tokens_per_turn=tuple(len(answer) for answer in answers),
        prefill_rounds=PREFILL_ROUNDS,
        probed_prefill_s=probed,
        answers=tuple(_text(workload, answer) for answer in answers),
        arms=tuple(
            _result(arm, wanted, workload, prepared)
            for name in ARMS
            for arm in running
            if arm.name == name and name in arms
        ),
    )


def device_name(device: torch.device) -> str:
    """What the vendor calls it, or for a processor, its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def _baseline(
    checkpoint: Checkpoint, opening: list[int], progress: Progress
) -> tuple[Any, dict[str, float]]:
    """The model in the type in which it prefills fastest here, and the seconds of each type."""
    seconds: dict[str, float] = {}
    best: Any = None
    on_cpu = not torch.cuda.is_available()
    types = (torch.bfloat16, torch.float32) if on_cpu else (torch.bfloat16,)
    for number, dtype in enumerate(types):
        name = type_name(dtype)
        model = load_model(checkpoint, dtype)
        arm = TimedArm(name, model)
        progress(f"Timing a prefill in {name}", 0.02 + 0.08 * number)
        arm.warm_up(opening)
        if on_cpu:
            seconds[name] = min(_probe(arm, opening) for _ in range(PROBE_ROUNDS))
        if best is None or seconds[name] < min(t for n, t in seconds.items() if n != name):
            best = model
    return best, seconds


def _probe(arm: TimedArm, opening: list[int]) -> float:
    arm.cache = None
    took, _ = arm.read(opening[:PROBE_TOKENS])
    return took


def _play(
    running: list[TimedArm], workload: Workload, limit: int, progress: Progress
) -> tuple[list[list[int]], list[Tensor]]:
    """Takes all arms through the conversation, turn by turn.

    Returns:
        The reference's answers, and the logits ``[positions, V]`` that it wrote each of them from.
    """
    reference = running[0]
    ends = _ending_tokens(reference.model, workload.tokenizer)
    answers: list[list[int]] = []
    wanted: list[Tensor] = []
    for turn in range(workload.turns):
        # The last token of an answer is in no cache yet.
        last = answers[-1][-1:] if answers else []
        tokens = last + workload.prompt(turn, *last)

        # The first prompt is nearly all that is read.
        begin, share = (0.25, 0.45) if turn == 0 else (0.7 + 0.15 * (turn - 1), 0.15)
        before = [arm.cache for arm in running]
        first: list[Tensor] = []
        for round_ in range(PREFILL_ROUNDS):
            first = []
            for number, arm in enumerate(running):
                done = (round_ + number / len(running)) / PREFILL_ROUNDS
                progress(f"Turn {turn + 1}: reading, {arm.name}", begin + share * 0.6 * done)
                arm.cache = copy.deepcopy(before[number])
                took, logits = arm.read(tokens)
                first.append(logits)
                if round_ == 0:
                    arm.prompt_tokens.append(len(tokens))
                    arm.quantized_per_turn.append(arm.quantized_rows)
                    arm.ttft.append([])
                arm.ttft[turn].append(took)
        del before

        progress(f"Turn {turn + 1}: writing", begin + share * 0.6)
        answer = _write(running, first, limit, ends, own=turn == workload.turns - 1)
        wanted.append(reference.logits[-1])
        answers.append(answer)
    progress("Done", 1.0)
    return answers, wanted


def _write(
    running: list[TimedArm], first: list[Tensor], limit: int, ends: frozenset[int], own: bool
) -> list[int]:
    """Makes all arms write the reference's greedy answer, the first steps token by token in turns.

    The last token is not fed: as in any engine, it is read with the next prompt.

    Args:
        first: of each arm, the logits ``[V]`` of the first token.
        limit: of the answer, in tokens.
        ends: the tokens that end an answer.
        own: whether each arm then writes its own greedy answer, too.
    """
    reference, *others = running
    before = [copy.deepcopy(arm.cache) if own else None for arm in others]
    logits = [[row] for row in first]
    answer = [int(first[0].argmax())]
    while len(answer) < limit and answer[-1] not in ends:
        timed = len(answer) <= TIMED_STEPS
        for arm, rows in zip(running if timed else [reference], logits, strict=False):
            took, following = arm.step(answer[-1])
            rows.append(following)
            if timed:
                arm.steps.append(took)
        answer.append(int(logits[0][-1].argmax()))
    reference.own_answer = answer
    for arm, rows, cache in zip(others, logits[1:], before, strict=True):
        rows += arm.read_answer(answer[len(rows) - 1 : -1])
        if own:
            choices = [int(row.argmax()) for row in rows]
            arm.own_answer = arm.own(cache, answer, choices, limit, ends)
    for arm, rows in zip(running, logits, strict=True):
        arm.logits.append(torch.stack(rows).cpu())
    return answer


def _result(arm: TimedArm, wanted: list[Tensor], workload: Workload, prepared: Any) -> ComparedArm:
    kl, agrees = zip(
        *(divergence(reference, own) for reference, own in zip(wanted, arm.logits, strict=True)),
        strict=True,
    )
    per_turn = tuple(median(seconds) for seconds in arm.ttft)
    tokens = sum(arm.prompt_tokens)
    quantizes = arm.model is prepared and not arm.only_attention
    extra_bytes = summary(prepared).extra_bytes if quantizes else 0
    return ComparedArm(
        name=arm.name,
        device=arm.model.device.type,
        compute_dtype=type_name(arm.model.dtype),
        prefill_tokens=tokens,
        quantized_prefill_tokens=sum(arm.quantized_per_turn),
        ttft_s=sum(per_turn),
        ttft_s_per_turn=per_turn,
        prefill_tokens_per_s=tokens / sum(per_turn),
        tpot_s=median(arm.steps) if arm.steps else None,
        kl_mean=float(torch.cat(kl).mean()),
        top1_agreement=float(torch.cat(agrees).double().mean()),
        extra_bytes=extra_bytes,
        text=_text(workload, arm.own_answer),
    )


def _format_used(prepared: Any) -> tuple[str, str, bool]:
    """The format of most projections, what multiplies it, and whether natively."""
    if prepared is None:
        return "bf16", "torch", True
    made = summary(prepared)
    assert isinstance(made.recipe.format, dict)
    name = made.recipe.format["default"]
    for layer in made.layers:
        if layer.format == name:
            return name, layer.kernel, layer.native
    return name, "torch", True


def _attention(prepared: Any) -> str:
    patches = summary(prepared).patches if prepared is not None else ()
    return next((line for line in patches if line.startswith("attention")), "")


def _ending_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)


def _text(workload: Workload, answer: list[int]) -> str:
    text: str = workload.tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()
