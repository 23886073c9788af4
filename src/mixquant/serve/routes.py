"""The route of a request: over a prefill engine, or to a decode engine directly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request

from mixquant.serve.accepted import Refused, accepted

RouteName = Literal["transfer", "direct"]

GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# On the direct route the router, 0.1.17, does not show the engines of these paths the key.
NEED_TRANSFER = ("/v1/responses", "/v1/messages")
BYTES_PER_TOKEN = 4  # of English text and code; an estimate is enough to choose the route
# The headers of a client that the router gets: sessions, for its policies, and the trace.
PASSED_ON = ("x-session-id", "x-user-id", "x-tenant-id", "x-correlation-id", "traceparent")


@dataclass(frozen=True)
class RoutedRequest:
    """What is kept of a request while engines work on it. The parsed body takes far more memory.

    Attributes:
        content: JSON text in UTF-8.
        left_out: parameters that were not kept.
        streams: whether the answer comes in pieces.
        route: over a prefill engine (``transfer``) or to a decode engine alone (``direct``).
        reason: why it takes this route.
        session: what the turns of its conversation share.
    """

    content: bytes
    left_out: tuple[str, ...]
    streams: bool = False
    route: RouteName = "direct"
    reason: str = "prompt"
    session: str | None = None


def routed_request(path: str, raw: bytes, least: int) -> RoutedRequest:
    """The request that a client's body holds, without unknown parameters, and its route.

    Args:
        path: of the request.
        raw: its body.
        least: estimated tokens of a prompt from which on a transfer is worth it.

    Raises:
        Refused: the body is no request.
    """
    given = accepted(path, raw)
    if path not in GENERATES:
        return RoutedRequest(given.content, given.left_out)
    route, reason = route_of(given.body, least)
    if path in NEED_TRANSFER:
        route, reason = "transfer", "prompt"
    streams, session = bool(given.body.get("stream")), session_of(given.body)
    return RoutedRequest(given.content, given.left_out, streams, route, reason, session)


def passed_on(request: Request) -> dict[str, str]:
    """The headers of a client's request that the router gets.

    Raises:
        Refused: one of them holds what a header cannot.
    """
    found = {name: value for name in PASSED_ON if (value := request.headers.get(name)) is not None}
    for name, value in found.items():
        if not value.isascii() or not value.isprintable():
            raise Refused(400, f"the header {name} has to be printable ASCII")
    return found


def route_of(body: dict[str, Any], least: int) -> tuple[RouteName, str]:
    """The route of a generation, and why: a transfer must be possible, and worth its time."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int)
    if (
        several
        or body.get("use_beam_search")
        or any(isinstance(body.get(key), int) and body[key] > 1 for key in ("n", "best_of"))
    ):
        # The prefill engine releases a KV cache after it was read once.
        return "direct", "several_sequences"
    if body.get("prompt_logprobs") is not None or body.get("echo"):
        return "direct", "prompt_logprobs"  # these need the prompt's hidden states, not its cache
    if estimated_prompt_tokens(body) < least:
        return "direct", "short"
    return "transfer", "prompt"


def estimated_prompt_tokens(body: dict[str, Any]) -> int:
    """About how many tokens the prompt of a request has, without a tokenizer."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    names = ("messages", "tools", "system", "input", "instructions")
    parts = [prompt, *(body.get(name) for name in names)]
    size = sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in parts if part)
    return size // BYTES_PER_TOKEN


def session_of(body: dict[str, Any]) -> str | None:
    """What the turns of one conversation share, so that all reach the engines that hold its cache.

    A client can name its session (``x-session-id``, ``user``). Without a name, the session is a hash
    of the conversation's beginning, up to the first message of its user.
    """
    if body.get("user"):
        return hashlib.sha256(str(body["user"]).encode()).hexdigest()[:32]
    messages = body.get("messages") or body.get("input")
    if not isinstance(messages, list):
        return None
    opening: list[Any] = [body.get("system"), body.get("instructions")]
    opening = [one for one in opening if one is not None]
    for message in messages:
        opening.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).hexdigest()[:32]
