"""`mixquant generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mixquant.checkpoints.models import find, load_tokenizer
from mixquant.cli.answering import Answerer, check_length
from mixquant.cli.console import InputError, read_text, say
from mixquant.cli.options import (
    FormatOption,
    Model,
    NewTokens,
    PromptFile,
    RecipeOption,
    Seed,
    Temperature,
    chosen_recipe,
)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Prompt to answer.")] = None,
    prompt_file: PromptFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text without a chat template.")
    ] = False,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Answer one prompt. Only the answer goes to standard output, token by token."""
    if (prompt is None) == (prompt_file is None):
        raise InputError("give either PROMPT or --prompt-file")
    text = read_text(prompt_file) if prompt_file is not None else prompt or ""
    if not text.strip():
        raise InputError("the prompt is empty")
    chosen = chosen_recipe(recipe, format)
    checkpoint = find(model, say)
    tokenizer = load_tokenizer(checkpoint)
    if raw:
        tokens = tokenizer(text)["input_ids"]
    else:
        from mixquant.conversation import opening

        tokens = opening(tokenizer, [{"role": "user", "content": text}])
    check_length(checkpoint, len(tokens), max_new_tokens)

    Answerer(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed).answer(tokens)
