"""Requests to an OpenAI-compatible server, by OpenAI's own client, which retries with backoff."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixquant.evaluate.tasks import Message, Reply
from mixquant.evaluate.tasks.extraction import THOUGHTS

if TYPE_CHECKING:
    import openai

_CONNECT_SECONDS = 15


class ChatError(RuntimeError):
    """A request that failed in the end. The message is one line.

    Attributes:
        attempts: how often it was made.
        unreachable: whether no server answered, rather than one that refused.
    """

    def __init__(self, message: str, attempts: int = 1, unreachable: bool = False) -> None:
        super().__init__(" ".join(message.split())[:500])
        self.attempts = attempts
        self.unreachable = unreachable


@dataclass
class Usage:
    """What the requests of one item took."""

    attempts: int = 0  # requests made, retries among them
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # retries and their waits among them


class Endpoint:
    """A model behind a server; an async context manager.

    Args:
        url: of the server, without ``/v1``.
        model: what it calls the model.
        options: of each request, see `sampling`.
        retries: of a request that fails with 408, 409, 429, 5xx, a timeout or a lost connection; the
            waits between them grow from 0.5 s to 8 s.
        timeout: of one request in seconds.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        options: Mapping[str, Any] | None = None,
        retries: int = 8,
        timeout: float = 3600,
    ) -> None:
        import openai

        self.url = f"{url}/v1"
        self.key = key or "none"  # the client requires a key
        self.model = model
        self.options: Mapping[str, Any] = options or {}
        self.client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.key,
            max_retries=retries,
            timeout=openai.Timeout(timeout, connect=_CONNECT_SECONDS),
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()

    def chat(self, options: Mapping[str, Any] | None = None) -> CountingChat:
        """A chat that counts what it takes; ``options`` in place of the endpoint's."""
        return CountingChat(self, self.options if options is None else options)

    async def answers(self) -> bool:
        """Whether the server answers at all."""
        import openai

        try:
            await self.client.models.list(timeout=_CONNECT_SECONDS)
        except openai.APIConnectionError:
            return False
        except openai.OpenAIError:
            pass
        return True


@dataclass
class CountingChat:
    """A `mixquant.evaluate.tasks.Chat` for one item."""

    endpoint: Endpoint
    options: Mapping[str, Any]
    usage: Usage = field(default_factory=Usage)

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def key(self) -> str:
        return self.endpoint.key

    @property
    def model(self) -> str:
        return self.endpoint.model

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        seed: int | None = None,
        **options: Any,
    ) -> Reply:
        import openai

        given = {**self.options, **options}
        if tools:
            given["tools"] = list(tools)
        if seed is not None:
            given["seed"] = seed
        given["messages"] = list(messages)
        client = self.endpoint.client
        start = time.monotonic()
        try:
            raw = await client.chat.completions.with_raw_response.create(model=self.model, **given)
            retries = raw.retries_taken
            completion = raw.parse()
        except openai.OpenAIError as error:
            attempts = 1 + (client.max_retries if _retried(error) else 0)
            self._count(attempts, start)
            raise ChatError(_reason(error), attempts, _unreachable(error)) from error
        except ValueError as error:  # the body is not JSON
            self._count(1, start)
            raise ChatError(f"the server's answer cannot be read: {error}") from error
        self._count(retries + 1, start)
        return self._reply(completion, retries + 1)

    def _count(self, attempts: int, start: float) -> None:
        self.usage.attempts += attempts
        self.usage.seconds += time.monotonic() - start

    def _reply(self, completion: Any, attempts: int) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            raise ChatError("the server's answer has no choices", attempts)
        if usage := completion.usage:
            self.usage.prompt_tokens += usage.prompt_tokens
            self.usage.completion_tokens += usage.completion_tokens
        message = choices[0].message
        # vLLM's name of the field, and its earlier name.
        reasoning = getattr(message, "reasoning", None) or getattr(
            message, "reasoning_content", None
        )
        text = message.content or ""
        if not reasoning:
            reasoning, text = split_reasoning(text)
        return Reply(
            text=text.strip(),
            reasoning=reasoning.strip(),
            tool_calls=tuple(call.model_dump() for call in message.tool_calls or ()),
            finish=choices[0].finish_reason or "stop",
        )


def sampling(
    *, temperature: float, top_p: float, top_k: int, max_tokens: int, thinking: bool
) -> dict[str, Any]:
    """The options of a request with these settings, as vLLM takes them."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "extra_body": {"top_k": top_k, "chat_template_kwargs": {"enable_thinking": thinking}},
    }


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the answer of a server that has no parser for reasoning.

    Reasoning ends with the last ``</think>`` (of Gemma 4: ``<channel|>``); without one, a text that
    begins with a thought was cut off while the model reasoned, and has no answer. Chat templates that
    open the thought themselves leave only the end in the text.
    """
    for begin, end in THOUGHTS:
        reasoning, ended, answer = text.rpartition(end)
        if ended:
            return reasoning.lstrip().removeprefix(begin), answer
        if text.lstrip().startswith(begin):
            return text.lstrip().removeprefix(begin), ""
    return "", text


def _retried(error: openai.OpenAIError) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _unreachable(error: openai.OpenAIError) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) and not isinstance(
        error, openai.APITimeoutError
    )


def _reason(error: openai.OpenAIError) -> str:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "the server did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"the connection failed: {error.__cause__ or error}"
    return str(error)
