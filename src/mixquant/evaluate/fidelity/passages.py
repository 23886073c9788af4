"""Texts cut in two: a prompt, and its continuation in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixquant.checkpoints.models import Checkpoint
from mixquant.errors import MixquantError


class PassageError(MixquantError, ValueError):
    """Texts or lengths that cannot be used. The message is one line."""


@dataclass(frozen=True)
class Passages:
    """The beginnings of some texts, all cut at the same position. In tokens."""

    prompt_tokens: int
    prompts: tuple[tuple[int, ...], ...]  # [texts][prompt_tokens]
    continuations: tuple[tuple[int, ...], ...]  # [texts][answer tokens]


def documentation(count: int) -> dict[str, str]:
    """Python's own documentation as so many texts, named after their first topic.

    The topics are distributed, the longest first, so no two texts share one.

    Raises:
        PassageError: there are not as many topics.
    """
    from pydoc_data.topics import topics

    if count > len(topics):
        raise PassageError(f"the built-in documentation has {len(topics)} texts, not {count}")
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return {
        f"Python documentation: {names[first]}": "\n\n".join(
            topics[name] for name in names[first::count]
        )
        for first in range(count)
    }


def cut(
    texts: dict[str, str], tokenizer: Any, lengths: Sequence[int], answer_tokens: int
) -> list[Passages]:
    """The passages of each prompt length.

    Args:
        texts: by name.
        tokenizer: of the model. Tokens that it puts in front of a text are kept.
        lengths: of the prompts, in tokens.
        answer_tokens: of each continuation.

    Raises:
        PassageError: a text is too short.
    """
    read = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    needed = max(lengths) + answer_tokens
    for name, tokens in read.items():
        if len(tokens) < needed:
            raise PassageError(
                f"{name} is too short: it has {len(tokens)} tokens; a prompt of {max(lengths)} and a "
                f"continuation of {answer_tokens} need {needed}. Give a longer text or a smaller "
                "--length"
            )
    return [
        Passages(
            length,
            tuple(tuple(tokens[:length]) for tokens in read.values()),
            tuple(tuple(tokens[length : length + answer_tokens]) for tokens in read.values()),
        )
        for length in lengths
    ]


def check_lengths(checkpoint: Checkpoint, lengths: Sequence[int], answer_tokens: int) -> None:
    """Raises PassageError for a prompt and continuation that the model's context does not hold."""
    if checkpoint.context is not None and max(lengths) + answer_tokens > checkpoint.context:
        raise PassageError(
            f"a prompt of {max(lengths)} tokens and a continuation of {answer_tokens} exceed the "
            f"context of {checkpoint.name}, {checkpoint.context} tokens; give a smaller --length"
        )
