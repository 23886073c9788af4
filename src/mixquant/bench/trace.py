"""Agent traces: recorded conversations whose prompts grow by tool results, and their turns as
tokens.

A trace is a JSONL file with one session a line: ``{"session": NAME, "messages": [...]}``, with
messages in OpenAI's chat format. Every message of the assistant is a turn to replay: the prompt is
everything before it, and the answer has as many tokens as the recorded one. The next turn reads the
recorded answer, not the model's, so all arms read the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json

BUILTIN = "builtin"


class TraceError(MixquantError, ValueError):
    """A trace that cannot be replayed. The message is one line; it names the line and the field."""


class Message(BaseModel):
    """One message. Other fields, as recorders add them, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if not self.content and not self.tool_calls:
            raise ValueError("a message has either content or tool_calls")
        return self

    def text(self) -> str:
        """The text that a model reads: the role, the content, and calls as JSON."""
        calls = [json.dumps(call, ensure_ascii=False) for call in self.tool_calls or ()]
        return "\n".join([f"<{self.role}>", *([self.content] if self.content else []), *calls, ""])


class Session(BaseModel):
    """One conversation of an agent."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    session: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=2)

    @model_validator(mode="after")
    def _has_turns(self) -> Session:
        if self.messages[0].role == "assistant":
            raise ValueError("the first message is the assistant's: nothing is asked before it")
        if all(message.role != "assistant" for message in self.messages):
            raise ValueError("no message is the assistant's: there is no turn to replay")
        return self


@dataclass(frozen=True)
class Request:
    """The prompt of one request, and the length of its answer."""

    prompt: tuple[int, ...]
    output_tokens: int


def read_trace(source: str) -> list[Session]:
    """The sessions of a file, or of the trace that ships with mixquant.

    Args:
        source: a path, or ``builtin``.

    Raises:
        TraceError: it cannot be read, or a line is no session; says which and why.
    """
    try:
        if source == BUILTIN:
            text = (files("mixquant.bench") / "data" / "agent_trace.jsonl").read_text("utf-8")
        else:
            text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TraceError(f"cannot read {source}: it is not UTF-8 text") from None
    except OSError as error:
        raise TraceError(f"cannot read {source}: {error.strerror or error}") from None
    return parse(text, source)


def parse(text: str, source: str) -> list[Session]:
    """The sessions of JSON lines; empty lines are ignored.

    Raises:
        TraceError: a line is no session, a name occurs twice, or there is none.
    """
    sessions: list[Session] = []
    # Not splitlines, which also splits at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            values = parse_json(line)
        except ReadingError as error:
            raise TraceError(f"{where} is not JSON: {error}") from None
        try:
            session = Session.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            at = f", field {field!r}" if field else ""
            raise TraceError(f"{where}{at}: {first['msg']}") from None
        if any(session.session == other.session for other in sessions):
            raise TraceError(f"{where}, field 'session': {session.session!r} occurs twice")
        sessions.append(session)
    if not sessions:
        raise TraceError(f"{source} holds no session")
    return sessions


def turns(session: Session, tokenizer: Any, mark: str) -> list[Request]:
    """The requests of a session, in order; the prompt of each begins with that of the one before.

    Messages are tokenized one by one, without the model's chat template: templates drop or move what
    lies further back, and then nothing could be reused.

    Args:
        mark: put in front of all, so that what one run left in a prefix cache is no use to another.
    """

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    read = tokens(f"{mark}\n")
    found: list[Request] = []
    for message in session.messages:
        written = tokens(message.text())
        if message.role == "assistant":
            # At least one: some tokenizers drop all there is to drop of a strange message.
            found.append(Request(tuple(read), max(len(written), 1)))
        read += written
    return found
