"""`mixquant chat`."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from mixquant.checkpoints.models import Checkpoint, find, load_tokenizer
from mixquant.cli.answering import Answerer, check_length
from mixquant.cli.console import InputError, err, out, print_error, say
from mixquant.cli.options import (
    FormatOption,
    Model,
    NewTokens,
    RecipeOption,
    Seed,
    Temperature,
    chosen_recipe,
)
from mixquant.files.reading import shown

HELP = (
    "/reset forgets the conversation, /exit ends the chat, /help shows this line; "
    "Ctrl-C stops an answer"
)
_COMMAND = re.compile(r"/\w*")  # a first word with another slash in it is a path


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")
    ] = None,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with the model over several turns. What it has read stays in the KV cache.

    One line of standard input is one message. /help lists the commands of a chat. Ctrl-C stops an
    answer; a second Ctrl-C, or the end of the input, ends the chat.
    """
    from mixquant.conversation import opening, reply

    chosen = chosen_recipe(recipe, format)
    checkpoint = find(model, say)
    tokenizer = load_tokenizer(checkpoint)
    before = [] if system is None else [{"role": "system", "content": system}]
    # Now, and not at the first or second turn, if the template cannot render a conversation.
    opening(tokenizer, [*before, {"role": "user", "content": "?"}])
    reply(tokenizer, "?")
    answerer = Answerer(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed)
    if sys.stdin.isatty():
        err.print(f"[dim]{HELP}[/dim]")

    with suppress(KeyboardInterrupt):
        _converse(answerer, tokenizer, checkpoint, before, max_new_tokens)


def _converse(
    answerer: Answerer,
    tokenizer: Any,
    checkpoint: Checkpoint,
    before: list[dict[str, Any]],
    max_new_tokens: int,
) -> None:
    from mixquant.conversation import opening, reply

    while (message := _next_message()) is not None:
        if not message:
            continue
        if _COMMAND.fullmatch(message.split()[0]):
            if message == "/exit":
                return
            if message == "/reset":
                answerer.reset()
            elif message == "/help":
                err.print(f"[dim]{HELP}[/dim]")
            else:
                print_error(f"unknown command {shown(message)}; {HELP}")
            continue
        tokens = answerer.tokens
        if tokens:
            tokens = tokens + reply(tokenizer, message, tokens[-1])
        else:
            tokens = opening(tokenizer, [*before, {"role": "user", "content": message}])
        try:
            check_length(checkpoint, len(tokens), max_new_tokens)
        except InputError as error:
            print_error(f"{error}; /reset starts a new conversation")
            continue
        answerer.answer(tokens, stoppable=True)


def _next_message() -> str | None:
    try:
        typed = sys.stdin.isatty()
        line = f"{out.input('[bold]> [/bold]')}\n" if typed else sys.stdin.readline()
        line.encode()  # in some locales Python accepts bytes that are not text
    except EOFError:
        return None
    except UnicodeError:
        raise InputError("standard input is not UTF-8 text") from None
    return line.strip() if line else None
