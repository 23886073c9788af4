"""How far recipes are from BF16 on given passages, in one pass for each batch of texts.

The same figures as `mixquant fidelity`'s: KL over the whole vocabulary at each position of the texts'
own continuations. Here the continuation is read with the prompt, its rows precise, instead of token by
token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoints.models import Checkpoint, load_model
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import everything_in_prefill_format, phase, prepare
from mixquant.evaluate.divergence import divergence
from mixquant.evaluate.fidelity.answers_transformers import ROWS_AT_ONCE
from mixquant.evaluate.fidelity.passages import Passages

Logits = tuple[Tensor, ...]
"""For each text ``[answer tokens, V]``, on the CPU."""


def kl(checkpoint: Checkpoint, recipe: Recipe, passages: Passages, reference: Logits) -> float:
    """The mean KL(BF16, recipe) in nats per token; with ``everywhere``, that of quantizing both phases.

    Passes are quantized however few rows they have.

    Raises:
        ModelError, PrepareError, RecipeError: the model cannot be loaded, or not prepared so.
    """
    model = prepare(load_model(checkpoint, torch.bfloat16), replace(recipe, min_prefill_tokens=0))
    own = logits(model, passages, recipe.everywhere)
    del model
    free()
    found = [divergence(wanted, one)[0] for wanted, one in zip(reference, own, strict=True)]
    return float(torch.stack(found).mean())


@torch.no_grad()
def logits(model: Any, passages: Passages, everywhere: bool = False) -> Logits:
    """The predictions at each position of the continuations.

    Args:
        model: prepared or not; one that is not reads everything in BF16.
        everywhere: whether a prepared model quantizes the continuations' rows, too.
    """
    tokens = torch.tensor(
        [
            [*prompt, *continuation[:-1]]
            for prompt, continuation in zip(passages.prompts, passages.continuations, strict=True)
        ],
        device=model.device,
    )
    answer = len(passages.continuations[0])
    found: list[Tensor] = []
    for some in tokens.split(max(1, ROWS_AT_ONCE // tokens.shape[1])):
        said = (
            everything_in_prefill_format()
            if everywhere
            else phase("prefill", passages.prompt_tokens)
        )
        with said:
            output = model(input_ids=some, use_cache=False, logits_to_keep=answer)
        found.extend(output.logits.cpu())
    return tuple(found)


def in_bf16(checkpoint: Checkpoint, use: Callable[[Any], Any]) -> Any:
    """Loads the model in BF16, applies a function to it, frees it, and returns the result."""
    model = load_model(checkpoint, torch.bfloat16)
    made = use(model)
    del model
    free()
    return made


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
