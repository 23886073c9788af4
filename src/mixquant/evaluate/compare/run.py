"""The main job: one conversation in three arms, with what quantizing costs and gains.

``bf16`` is the model without mixquant. It answers greedily, and its answers are the reference.
``mixquant`` quantizes prefill, ``quantized`` both phases. All arms read the same prompts and are
made to write the same answers, the reference's, so that they do the same work and each position's
distribution can be held against the reference's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoints.models import Checkpoint, ModelError, load_model
from mixquant.core.phase import plan_in_force
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import (
    everything_in_prefill_format,
    phase,
    prepare,
    summary,
)
from mixquant.evaluate.compare.workload import Workload
from mixquant.results import ComparedArm, Comparison, Environment

ARMS = ("bf16", "quantized", "mixquant")

# A prompt is read this often by each arm, in turns, and the median counts: other work on the
# machine then hits all arms alike.
PREFILL_ROUNDS = 3

_WARM_UP_TOKENS = 256
_WARM_UP_STEPS = 3

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
        PrepareError, RecipeError: the model cannot be prepared so.
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
    players = [_Player("bf16", baseline, quantize_all=False)]
    prepared = None
    if set(arms) != {"bf16"}:
        progress("Quantizing", 0.17)
        prepared = prepare(load_model(checkpoint, torch.bfloat16), recipe)
        players += [
            _Player(name, prepared, quantize_all=name == "quantized")
            for name in ("mixquant", "quantized")
            if name in arms
        ]
        for number, player in enumerate(players[1:]):
            progress("Compiling and warming up", 0.2 + 0.03 * number)
            player.warm_up(opening)

    answers, wanted = _play(players, workload, max_new_tokens, progress)
    reference = players[0]
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
        workload=workload.description,
        prompt_tokens_per_turn=tuple(reference.prompt_tokens),
        answer_tokens_per_turn=tuple(len(answer) for answer in answers),
        prefill_rounds=PREFILL_ROUNDS,
        probed_prefill_s=probed,
        answers=tuple(_text(workload, answer) for answer in answers),
        arms=tuple(
            _result(player, wanted, workload, prepared)
            for name in ARMS
            for player in players
            if player.name == name and name in arms
        ),
    )


def device_name(device: torch.device) -> str:
    """What the vendor calls it, or for a processor, its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


@dataclass
class _Player:
    """One arm on its way through the conversation."""

    name: str
    model: Any
    quantize_all: bool
    cache: Any = None
    quantized_rows: int = 0
    prompt_tokens: list[int] = field(default_factory=list)  # per turn
    ttft: list[list[float]] = field(default_factory=list)  # per turn and round
    quantized_per_turn: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # per turn, [positions, V]
    own_answer: list[int] = field(default_factory=list)

    def read(self, tokens: list[int]) -> tuple[float, Tensor]:
        """Prefills a prompt in one pass; returns seconds and the next token's logits ``[V]``."""
        with self._counted(), phase("prefill"):
            return self._forward(tokens)

    def step(self, token: int) -> tuple[float, Tensor]:
        """Decodes one token; returns seconds and the next token's logits ``[V]``."""
        return self._forward([token])

    def answer(self, first: Tensor, limit: int, ends: frozenset[int]) -> tuple[list[int], Tensor]:
        """Answers greedily, and then stands where it stood before.

        Args:
            first: ``[V]``, the logits of the first token.
            limit: of the answer, in tokens.
            ends: the tokens that end an answer.

        Returns:
            The answer, and the logits ``[len(answer), V]`` that its tokens were taken from.
        """
        before = self.cache
        self.cache = copy.deepcopy(before)
        logits = [first]
        written = [int(first.argmax())]
        while len(written) < limit and written[-1] not in ends:
            _, following = self.step(written[-1])
            logits.append(following)
            written.append(int(following.argmax()))
        self.cache = before
        return written, torch.stack(logits).cpu()

    def warm_up(self, tokens: list[int]) -> None:
        """Compiles, allocates and fills caches: what only the first passes pay."""
        self.read(tokens[:_WARM_UP_TOKENS])
        for token in tokens[:_WARM_UP_STEPS]:
            self.step(token)
        self.cache = None

    def _forward(self, tokens: list[int]) -> tuple[float, Tensor]:
        ids = torch.tensor([tokens], device=self.model.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.quantize_all:
                stack.enter_context(everything_in_prefill_format())
            begun = _now(ids.device)
            output = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            took = _now(ids.device) - begun
        self.cache = output.past_key_values
        return took, output.logits[0, -1]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the rows that the plan in force quantizes."""

        def count(*args: Any) -> None:
            plan = plan_in_force()
            self.quantized_rows = plan.quantized_rows if plan else 0

        hook = self.model.get_decoder().register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()


def _baseline(
    checkpoint: Checkpoint, opening: list[int], progress: Progress
) -> tuple[Any, dict[str, float]]:
    """The model in the type in which it prefills fastest here, and the seconds of each type."""
    seconds: dict[str, float] = {}
    best: Any = None
    on_cpu = not torch.cuda.is_available()
    types = (torch.bfloat16, torch.float32) if on_cpu else (torch.bfloat16,)
    for number, dtype in enumerate(types):
        name = _type_name(dtype)
        model = load_model(checkpoint, dtype)
        player = _Player(name, model, quantize_all=False)
        progress(f"Timing a prefill in {name}", 0.02 + 0.08 * number)
        player.warm_up(opening)
        if on_cpu:
            seconds[name], _ = player.read(opening)
        if best is None or seconds[name] < min(t for n, t in seconds.items() if n != name):
            best = model
    return best, seconds


def _play(
    players: list[_Player], workload: Workload, limit: int, progress: Progress
) -> tuple[list[list[int]], list[Tensor]]:
    """Takes all arms through the conversation, turn by turn.

    Returns:
        The reference's answers, and the logits ``[positions, V]`` that it wrote each of them from.
    """
    reference = players[0]
    ends = _ending_tokens(reference.model, workload.tokenizer)
    answers: list[list[int]] = []
    wanted: list[Tensor] = []
    for turn in range(workload.turns):
        # The last token of an answer is in no cache yet.
        last = answers[-1][-1:] if answers else []
        tokens = last + workload.prompt(turn, *last)

        # The first prompt is nearly all that is read.
        begin, share = (0.25, 0.45) if turn == 0 else (0.7 + 0.15 * (turn - 1), 0.15)
        before = [player.cache for player in players]
        first: list[Tensor] = []
        for round_ in range(PREFILL_ROUNDS):
            first = []
            for number, player in enumerate(players):
                done = (round_ + number / len(players)) / PREFILL_ROUNDS
                progress(f"Turn {turn + 1}: reading, {player.name}", begin + share * 0.6 * done)
                player.cache = copy.deepcopy(before[number])
                took, logits = player.read(tokens)
                first.append(logits)
                if round_ == 0:
                    player.prompt_tokens.append(len(tokens))
                    player.quantized_per_turn.append(player.quantized_rows)
                    player.ttft.append([])
                player.ttft[turn].append(took)
        del before

        progress(f"Turn {turn + 1}: writing the reference", begin + share * 0.6)
        answer, logits_written = reference.answer(first[0], limit, ends)
        wanted.append(logits_written)
        answers.append(answer)
        reference.own_answer = answer
        if turn == workload.turns - 1:
            progress("Writing the other arms' own answers", begin + share * 0.7)
            for player, logits in zip(players[1:], first[1:], strict=True):
                player.own_answer, _ = player.answer(logits, limit, ends)
        progress(f"Turn {turn + 1}: writing, teacher-forced", begin + share * 0.8)
        _force(players, first, answer)
    progress("Done", 1.0)
    return answers, wanted


def _force(players: list[_Player], first: list[Tensor], answer: list[int]) -> None:
    """Makes all arms write an answer, token by token in turns, so that they meet the same noise.

    The last token is not fed: as in any engine, it is read with the next prompt.
    """
    logits = [[its_first] for its_first in first]
    for token in answer[:-1]:
        for player, its_logits in zip(players, logits, strict=True):
            took, following = player.step(token)
            player.steps.append(took)
            its_logits.append(following)
    for player, its_logits in zip(players, logits, strict=True):
        player.logits.append(torch.stack(its_logits).cpu())


def _result(
    player: _Player, wanted: list[Tensor], workload: Workload, prepared: Any
) -> ComparedArm:
    kl, agrees = zip(
        *(divergence(reference, own) for reference, own in zip(wanted, player.logits, strict=True)),
        strict=True,
    )
    per_turn = tuple(median(seconds) for seconds in player.ttft)
    tokens = sum(player.prompt_tokens)
    extra_bytes = summary(prepared).extra_bytes if player.model is prepared else 0
    return ComparedArm(
        name=player.name,
        device=player.model.device.type,
        compute_dtype=_type_name(player.model.dtype),
        prefill_tokens=tokens,
        # A plan knows rows, not layers: it has quantized rows even where no layer is quantized.
        quantized_prefill_tokens=sum(player.quantized_per_turn) if extra_bytes else 0,
        ttft_s=sum(per_turn),
        ttft_s_per_turn=per_turn,
        prefill_tokens_per_s=tokens / sum(per_turn),
        tpot_s=median(player.steps) if player.steps else None,
        kl_mean=float(torch.cat(kl).mean()),
        top1_agreement=float(torch.cat(agrees).double().mean()),
        extra_bytes=extra_bytes,
        text=_text(workload, player.own_answer),
    )


def divergence(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How far distributions are from a reference, position by position.

    Args:
        reference: logits ``[positions, V]``.
        other: logits ``[positions, V]``.

    Returns:
        KL(reference, other) in nats ``[positions]`` FP64, and whether the likeliest token is the
        same ``[positions]``.
    """
    log_p = reference.double().log_softmax(dim=-1)
    log_q = other.double().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl, reference.argmax(dim=-1) == other.argmax(dim=-1)


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


def _ending_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)


def _text(workload: Workload, answer: list[int]) -> str:
    text: str = workload.tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
