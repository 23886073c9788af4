"""Reads the answers of routers: what they say about engines, and what a client or the log may see."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

from mixquant.serve.listener import error_body

# The router's ids for transferred requests hold the addresses of both engines.
_INNER_ID = re.compile(
    rb'(?<!\\)"([a-z]+[-_])?___prefill_addr_[^"\\]*?_([0-9a-f]{32})', re.IGNORECASE
)
# The router's message if a prefill engine answered with an error.
_OF_PREFILL = re.compile(r"Prefill server \S+ returned (\d{3})[^:]*: (.*)", re.DOTALL)
_NOT_READ = re.compile(r"Failed to (?:deserialize|parse) the (?:JSON|request) body[^:]*: (.*)")
_SAID_OTHERWISE = (  # Rust's names of JSON's types
    (re.compile(r" at line \d+ column \d+$"), ""),
    (
        re.compile(r"data did not match any variant of untagged enum \w+"),
        "it has a type that is not known here",
    ),
    (
        re.compile(r"expected [iu]\d+\b"),
        "expected a whole number that is not negative or too large",
    ),
    (re.compile(r"expected f\d+\b"), "expected a number"),
    (re.compile(r"expected a sequence\b"), "expected a list"),
    (re.compile(r"expected (?:a map|struct \w+)"), "expected an object"),
)
UNREADY = (502, 503, 504)  # statuses that say that no engine answered
BROKEN = (500, *UNREADY)  # statuses that a dead engine may cause
DEAD = "EngineCore encountered an issue"  # vLLM's message after the process that computes has ended
GAVE_UP = "Internal server error"  # vLLM's message if the transfer of a KV cache failed
FAILED = "an engine failed at this request; its log says how"
BROKE_OFF = "the engine that was answering crashed; try again"
_MODEL = ("id", "object", "created", "owned_by", "max_model_len")


def own_error(answer: httpx.Response) -> str | None:
    """The error message of an engine that is still alive; None for any other answer."""
    if answer.status_code != 500:
        return None
    text = answer.text
    of_prefill = _OF_PREFILL.search(text)
    if of_prefill:
        status, text = of_prefill.groups()
        if status != "500":
            return None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"]["message"])
    return FAILED if of_prefill or text == "Internal Server Error" else None


def quotes_prefill(answer: httpx.Response) -> bool:
    """Whether a router quotes the answer of a prefill engine, which can hold parts of a prompt."""
    return _OF_PREFILL.search(answer.text) is not None


def is_json(answer: httpx.Response) -> bool:
    return "json" in answer.headers.get("content-type", "")


def loggable(answer: httpx.Response) -> str:
    """The part of an answer that may be logged. Answers of engines are JSON and can hold parts of a
    prompt."""
    if is_json(answer) or own_error(answer) is not None or quotes_prefill(answer):
        return str(answer.status_code)
    return f"{answer.status_code} {answer.text[:300]}"


def refused_by_prefill(answer: httpx.Response) -> httpx.Response | None:
    """The answer of a prefill engine that refused the request, if a router quotes one."""
    found = _OF_PREFILL.search(answer.text)
    if found is None or not 400 <= int(found[1]) < 500:
        return None
    return httpx.Response(int(found[1]), text=found[2])


def refusal(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer with a status of 4xx, in the shape of OpenAI's API."""
    with contextlib.suppress(ValueError):
        given = answer.json()
        if isinstance(given, dict) and isinstance(given.get("error"), dict):
            return given
    message = "the request cannot be served as it is"
    if found := _NOT_READ.match(answer.text):
        reason = found[1]
        for pattern, words in _SAID_OTHERWISE:
            reason = pattern.sub(words, reason)
        message = f"the request cannot be read: {reason}"
    return error_body(answer.status_code, message)


def without_addresses(content: bytes) -> bytes:
    """An answer whose id does not name the addresses of engines."""
    return _INNER_ID.sub(rb'"\1\2', content)


def models(content: bytes) -> bytes:
    """The list of models without the paths of their files."""
    data = [
        {name: one[name] for name in _MODEL if name in one} | {"root": one["id"]}
        for one in json.loads(content)["data"]
    ]
    return json.dumps({"object": "list", "data": data}).encode()


async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """A streamed answer, line by line. If the stream breaks off, it ends with an error event."""
    rest = b""
    try:
        async for piece in answer.aiter_raw():
            lines, newline, rest = (rest + piece).rpartition(b"\n")
            if newline:
                yield without_addresses(lines + newline)
        if rest:
            yield without_addresses(rest)
    except httpx.HTTPError:
        yield f"data: {json.dumps(error_body(502, BROKE_OFF))}\n\n".encode()
    finally:
        await answer.aclose()
