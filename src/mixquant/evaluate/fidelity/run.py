"""How far arms are from BF16 on the same texts, next to what they cost.

``bf16`` is the model without mixquant, and the reference. Every arm reads the same prompts. Then each is
made to write what follows in the texts, so that its distribution at each position can be compared with
the reference's. Apart from that, each arm answers by itself, greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from mixquant.checkpoints.models import Checkpoint
from mixquant.core.recipe import Recipe
from mixquant.evaluate.divergence import divergence
from mixquant.evaluate.fidelity.answers import Answers, Engine, EngineError, Progress
from mixquant.evaluate.fidelity.cost import cost, cost_of_bf16
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.results import BASELINE, Arm, Cost, Divergence, Environment, Fidelity, Position


def measure(
    engine: Engine,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    passages: Sequence[Passages],
    *,
    others: Mapping[str, tuple[Engine, str]] | None = None,
    description: Mapping[str, object],
    progress: Progress = lambda doing, share: None,
    done: Callable[[Fidelity], None] = lambda so_far: None,
) -> Fidelity:
    """Runs the reference and every recipe, one after the other.

    Args:
        engine: what runs an arm.
        recipes: by the name of their arm.
        passages: of every prompt length.
        others: further arms by name: what runs each, and its arguments for readers.
        description: the result's ``command``, ``engine`` and ``texts``.
        progress: is told what is being done, and the share that is done.
        done: is given what is measured so far, after each arm.

    Raises:
        EngineError: an arm's vocabulary is another.
        What the engine does.
    """
    environment = Environment.here()
    arms: list[Arm] = []
    costs: list[Cost] = []
    results: list[Divergence] = []
    reference: tuple[Answers, ...] = ()
    plan: list[tuple[str, Engine, Recipe | None, str | None]] = [(BASELINE, engine, None, None)]
    plan += [(name, engine, recipe, None) for name, recipe in recipes.items()]
    plan += [(name, other, None, arguments) for name, (other, arguments) in (others or {}).items()]
    for number, (name, runs, recipe, arguments) in enumerate(plan):

        def report(doing: str, share: float, name: str = name, number: int = number) -> None:
            progress(f"{name}: {doing}", (number + share) / len(plan))

        run = runs(checkpoint, recipe, passages, report)
        if name == BASELINE:
            reference = run.answers
            costs.append(cost_of_bf16(name))
        elif run.layers:
            costs.append(cost(name, run.layers, checkpoint.config, run.head))
        _check_vocabulary(name, reference, run.answers)
        arms.append(Arm(name=name, recipe=run.recipe, arguments=arguments))
        results += [
            figures(name, one, wanted, own)
            for one, wanted, own in zip(passages, reference, run.answers, strict=True)
        ]
        so_far = Fidelity(
            environment=environment,
            model=checkpoint.name,
            arms=tuple(arms),
            costs=tuple(costs),
            results=tuple(results),
            **description,  # type: ignore[arg-type]
        )
        done(so_far)
    return so_far


def _check_vocabulary(name: str, reference: Sequence[Answers], own: Sequence[Answers]) -> None:
    expected, found = (answers[0].logits[0].shape[-1] for answers in (reference, own))
    if found != expected:
        raise EngineError(
            f"{name}: its vocabulary has {found} tokens, that of {BASELINE} {expected}: compare "
            "checkpoints with the same tokenizer"
        )


def figures(arm: str, passages: Passages, reference: Answers, own: Answers) -> Divergence:
    """One arm's figures at one prompt length, over all texts."""
    per_text = [
        (*divergence(wanted, logits), surprise(logits, continuation))
        for wanted, logits, continuation in zip(
            reference.logits, own.logits, passages.continuations, strict=True
        )
    ]
    kl, agrees, nats = (torch.stack(column).numpy() for column in zip(*per_text, strict=True))
    identical = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(wanted, answer, strict=True)))
        for wanted, answer in zip(reference.greedy, own.greedy, strict=True)
    ]
    return Divergence(
        arm=arm,
        prompt_tokens=passages.prompt_tokens,
        answers=kl.shape[0],
        answer_tokens=kl.size,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=float(agrees.mean()),
        perplexity=float(np.exp(nats.mean())),
        identical_tokens=float(np.mean(identical)),
        greedy_tokens=kl.shape[1],
        quantized_share=own.quantized_share,
        by_position=by_position(kl, agrees),
    )


def surprise(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """The negative log-likelihoods of tokens, in nats.

    Args:
        logits: ``[positions, V]``.
        tokens: one for each position.

    Returns:
        ``[positions]`` FP64.
    """
    wanted = torch.tensor(tokens)[:, None]
    return -logits.double().log_softmax(dim=-1).gather(-1, wanted)[:, 0]


def by_position(kl: np.ndarray, agrees: np.ndarray) -> tuple[Position, ...]:
    """Means over groups of positions that double in size: the first, the next two, the next four, ...

    Args:
        kl: ``[texts, answer tokens]``, in nats.
        agrees: the same shape, boolean.
    """
    positions = kl.shape[1]
    groups = []
    first = 1
    while first <= positions:
        inside = slice(first - 1, min(2 * first - 1, positions))
        groups.append(
            Position(
                first=first,
                kl_mean=float(kl[:, inside].mean()),
                top1=float(agrees[:, inside].mean()),
            )
        )
        first *= 2
    return tuple(groups)
