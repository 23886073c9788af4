"""A chat as tokens that only ever grow at the end, so that a KV cache of it stays valid.

Rendering the whole chat anew each turn does not do: templates rewrite earlier answers (they strip
reasoning, or white space), and an answer's text need not be cut into the tokens that it was
written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixquant.checkpoints.errors import ModelError
from mixquant.errors import one_line

Message = dict[str, Any]

_ANSWER = "@answer@"


class TemplateError(ModelError):
    """A chat template that cannot say a chat, or not all of it. The message is one line."""


def render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """The text of a chat up to where an answer is to be written, by the model's chat template.

    Templates take a message's content as a text or as a list of parts, and drop what they do not
    take: it is given in the way in which all of the messages are there.

    Args:
        messages: with ``role`` and ``content``, a text.
        options: go to the chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
        TemplateError: the template is broken, refuses the messages, or drops one of them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("this model has no chat template; only `mixquant generate --raw` runs it")
    marked = [
        {**message, "content": f"@{number}@" if message.get("content") else message.get("content")}
        for number, message in enumerate(messages)
    ]
    why = ""
    for say in (list, _in_parts):
        try:
            text = _applied(tokenizer, say(marked), options)
            lost = [m["role"] for m in marked if m.get("content") and m["content"] not in text]
            if not lost:
                return _applied(tokenizer, say(messages), options)
            kind = "earlier answers" if lost[0] == "assistant" else f"the {lost[0]}'s message"
            why = why or f"leaves out {kind}, so this chat cannot be had with it"
        except Exception as error:  # templates raise whatever they like, and so does what they call
            why = why or f"fails: {one_line(error)}"
    raise TemplateError(f"this model's chat template {why}")


def _applied(tokenizer: Any, messages: list[Message], options: dict[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    return text


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message.get("content")
        else message
        for message in messages
    ]


def opening(tokenizer: Any, messages: Sequence[Message], **options: Any) -> list[int]:
    """The tokens that a chat begins with, up to where the first answer is to be written.

    Args:
        messages: with ``role`` and ``content``, as chat templates take them.
        options: go to the chat template.

    Raises:
        ModelError: as `render`.
    """
    return _tokens(tokenizer, render(tokenizer, messages, **options))


def reply(tokenizer: Any, question: str, last: int | None = None, **options: Any) -> list[int]:
    """The tokens between an answer and the next one: its end, the user's turn, the next beginning.

    Args:
        last: the answer's last token. If it ends the turn already, it is not repeated.
        options: go to the chat template.

    Raises:
        ModelError: as `render`; templates that drop earlier answers are refused.
    """
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": question},
    ]
    text = render(tokenizer, messages, **options)
    tokens = _tokens(tokenizer, text.split(_ANSWER, 1)[1])
    return tokens[1:] if tokens[:1] == [last] else tokens


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # The template has written the special tokens.
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
