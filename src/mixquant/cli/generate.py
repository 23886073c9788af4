"""`mixquant generate` and `mixquant chat`."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Annotated, Any

import typer

from mixquant.checkpoints.models import Checkpoint, find, load_model, load_tokenizer
from mixquant.cli.console import InputError, err, out, print_error, read_text, say
from mixquant.cli.options import (
    FormatOption,
    Model,
    NewTokens,
    PromptFile,
    RecipeOption,
    Seed,
    Temperature,
    chosen_recipe,
    saved_recipe,
)
from mixquant.core.recipe import Recipe


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    prompt_file: PromptFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Answer one prompt; the answer alone goes to standard output, as it is written."""
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

    speaker = _Speaker(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed)
    speaker.answer(tokens)


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")
    ] = None,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk over several turns; what was read stays in the KV cache.

    One line of standard input is one message. /reset forgets the conversation, /exit, the end of
    the input and Ctrl-C end it.
    """
    from mixquant.conversation import opening, reply

    chosen = chosen_recipe(recipe, format)
    checkpoint = find(model, say)
    tokenizer = load_tokenizer(checkpoint)
    before = [] if system is None else [{"role": "system", "content": system}]
    # Now, rather than at the first or second turn, if the template cannot say that.
    opening(tokenizer, [*before, {"role": "user", "content": "?"}])
    reply(tokenizer, "?")
    speaker = _Speaker(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed)
    if sys.stdin.isatty():
        err.print("[dim]/reset forgets the conversation, /exit ends it[/dim]")

    with suppress(KeyboardInterrupt):
        _converse(speaker, tokenizer, checkpoint, before, max_new_tokens)


def _converse(
    speaker: _Speaker,
    tokenizer: Any,
    checkpoint: Checkpoint,
    before: list[dict[str, Any]],
    max_new_tokens: int,
) -> None:
    from mixquant.conversation import opening, reply

    while (message := _next_message()) is not None:
        if message == "/exit":
            return
        if message == "/reset":
            speaker.forget()
            continue
        if not message:
            continue
        said = speaker.tokens
        if said:
            said = said + reply(tokenizer, message, said[-1])
        else:
            said = opening(tokenizer, [*before, {"role": "user", "content": message}])
        try:
            check_length(checkpoint, len(said), max_new_tokens)
        except InputError as error:
            print_error(f"{error}; /reset begins anew")
            continue
        speaker.answer(said)


class _Speaker:
    """A prepared model that writes its answers to standard output and keeps its KV cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        recipe: Recipe | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        from transformers import TextStreamer, set_seed

        from mixquant.engines.transformers import prepare

        self._tokenizer = tokenizer
        self._model = prepare(load_model(checkpoint), recipe or saved_recipe(checkpoint))
        sampling = {"do_sample": True, "temperature": temperature}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        self._options = {
            **(sampling if temperature > 0 else greedy),
            "max_new_tokens": max_new_tokens,
            "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            "return_dict_in_generate": True,
        }
        set_seed(seed)
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        self.tokens: list[int] = []  # all that was said; its last one is in no cache yet
        self._cache: Any = None

    def answer(self, tokens: list[int]) -> None:
        """Continues ``tokens``, which begin with those of the conversation so far."""
        import torch

        cached = max(len(self.tokens) - 1, 0)
        ids = torch.tensor([tokens], device=self._model.device)
        begun = time.perf_counter()
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            **self._options,
        )
        took = time.perf_counter() - begun
        self.tokens, self._cache = output.sequences[0].tolist(), output.past_key_values
        err.print(
            f"[dim]read {len(tokens) - cached} tokens, {cached} were cached; "
            f"wrote {len(self.tokens) - len(tokens)}; {took:.1f} s[/dim]"
        )


def _next_message() -> str | None:
    try:
        typed = sys.stdin.isatty()
        line = f"{out.input('[bold]> [/bold]')}\n" if typed else sys.stdin.readline()
        line.encode()  # in some locales Python lets pass what is no text
    except EOFError:
        return None
    except UnicodeError:
        raise InputError("standard input is not UTF-8 text") from None
    return line.strip() if line else None


def check_length(checkpoint: Checkpoint, prompt: int, answer: int) -> None:
    if checkpoint.context is not None and prompt + answer > checkpoint.context:
        raise InputError(
            f"the prompt is too long: {prompt} tokens and an answer of {answer} exceed the context "
            f"of {checkpoint.context} tokens"
        )
