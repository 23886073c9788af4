"""A chat as tokens that only ever grow at the end, so that a KV cache of it stays valid.

Rendering the whole chat anew each turn does not do: templates rewrite earlier answers (they strip
reasoning, or white space), and an answer's text need not be cut into the tokens that it was
written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixquant.models import ModelError

Message = dict[str, Any]

_ANSWER = "@answer@"


def render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """The text of a chat up to where an answer is to be written, by the model's chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("this model has no chat template; only `mixquant generate --raw` runs it")
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **options
    )
    return text


def opening(tokenizer: Any, messages: Sequence[Message], **options: Any) -> list[int]:
    """The tokens that a chat begins with, up to where the first answer is to be written.

    Args:
        messages: with ``role`` and ``content``, as chat templates take them.
        options: go to the chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    return _tokens(tokenizer, render(tokenizer, messages, **options))


def reply(tokenizer: Any, question: str, last: int | None = None, **options: Any) -> list[int]:
    """The tokens between an answer and the next one: its end, the user's turn, the next beginning.

    Args:
        last: the answer's last token. If it ends the turn already, it is not repeated.
        options: go to the chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": question},
    ]
    text = render(tokenizer, messages, **options)
    tokens = _tokens(tokenizer, text.split(_ANSWER, 1)[1])
    return tokens[1:] if tokens[0] == last else tokens


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # The template has written the special tokens.
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
