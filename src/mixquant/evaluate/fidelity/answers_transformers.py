"""Runs arms on Transformers, in this process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoints.models import Checkpoint, load_model
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import phase, prepare, summary
from mixquant.engines.transformers.counting import quantized_rows
from mixquant.evaluate.fidelity.answers import Answers, ArmAnswers, Progress
from mixquant.evaluate.fidelity.passages import Passages

# Texts are read in one batch while their prompts together have no more tokens than this.
ROWS_AT_ONCE = 8192


def run(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    passages: Sequence[Passages],
    progress: Progress = lambda doing, share: None,
) -> ArmAnswers:
    """Loads the model in BF16, prepares it, and computes its answers. Only one model is in memory.

    Raises:
        ModelError: the model cannot be loaded.
        PrepareError, RecipeError: it cannot be prepared so.
    """
    progress("loading", 0.0)
    model = load_model(checkpoint, torch.bfloat16)
    if recipe is not None:
        progress("quantizing", 0.05)
        prepare(model, recipe)
    steps = sum(len(group) for one in passages for group in _groups(one))
    answers, done = [], 0
    for one in passages:
        parts = []
        for group in _groups(one):
            progress(f"{one.prompt_tokens} tokens", 0.1 + 0.9 * done / steps)
            parts.append(_answers(model, one, group))
            done += len(group)
        answers.append(_joined(parts))
    made = None if recipe is None else summary(model)
    head = model.get_output_embeddings()
    run = ArmAnswers(
        answers=tuple(answers),
        recipe=None if made is None else made.recipe.to_dict(),
        layers=() if made is None else made.layers,
        head=next((name for name, module in model.named_modules() if module is head), None),
    )
    del model, head
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run


def _groups(one: Passages) -> list[range]:
    """The numbers of the texts that are read in one batch."""
    size = max(1, ROWS_AT_ONCE // one.prompt_tokens)
    texts = len(one.prompts)
    return [range(first, min(first + size, texts)) for first in range(0, texts, size)]


@torch.no_grad()
def _answers(model: Any, one: Passages, group: range) -> Answers:
    prompts = torch.tensor([one.prompts[text] for text in group], device=model.device)
    forced = torch.tensor([one.continuations[text] for text in group], device=model.device)
    with quantized_rows(model) as quantized, phase("prefill"):
        output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    first, cache = output.logits[:, -1], output.past_key_values
    before = copy.deepcopy(cache)

    expected = [first.cpu()]
    for position in range(forced.shape[1] - 1):
        output = model(
            input_ids=forced[:, position : position + 1], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        expected.append(output.logits[:, -1].cpu())
    logits = torch.stack(expected, dim=1)  # [texts, answer tokens, V]

    written = [first.argmax(dim=-1)]
    cache = before
    while len(written) < forced.shape[1]:
        output = model(input_ids=written[-1][:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        written.append(output.logits[:, -1].argmax(dim=-1))
    greedy: Tensor = torch.stack(written, dim=1)

    return Answers(
        logits=tuple(logits),
        greedy=tuple(tuple(answer) for answer in greedy.tolist()),
        quantized_share=sum(quantized) / prompts.numel(),
    )


def _joined(parts: Sequence[Answers]) -> Answers:
    texts = sum(len(part.greedy) for part in parts)
    return Answers(
        logits=tuple(logits for part in parts for logits in part.logits),
        greedy=tuple(answer for part in parts for answer in part.greedy),
        quantized_share=sum(part.quantized_share * len(part.greedy) for part in parts) / texts,
    )
