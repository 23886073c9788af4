"""The parameters of a client's request that reach an engine: those listed here, and no others.

vLLM takes more parameters than OpenAI's API has, and trusts them: where to fetch a KV cache from,
for example, or arguments of its extensions. A parameter that is not listed is removed, at every
depth, as if the server did not know it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

TOO_DEEP = 100  # levels; the routers accept 127
# In one request; a prompt of a million token ids fits. Without a limit, 16 MiB of empty lists take
# a minute and a gigabyte, and block everything else for seconds.
MAX_VALUES = 1_200_000
MAX_LEFT_OUT, MAX_PATH = 100, 200  # parameters that an answer can name; characters of each
_STRING_OR_VALUE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{,]', re.DOTALL)


class Refused(Exception):
    """A request that is not passed on.

    Attributes:
        status: of the answer.
        message: one sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Data:
    """A parameter that may hold anything: a schema, the arguments of a tool."""


class Value:
    """A parameter that holds text, a number, or a list of these, but no object."""


DATA, VALUE = Data(), Value()
Known = Data | Value | dict[str, Any]


def _values(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), VALUE)


_URL = _values("url detail")
_PART: dict[str, Any] = {
    **_values("type text refusal thinking signature data id tool_use_id name is_error uuid"),
    **dict.fromkeys(("image_url", "audio_url", "video_url"), _URL),
    "input_audio": _values("data format"),
    "source": _values("type media_type data url"),
    "input": DATA,  # of a tool
    "cache_control": _values("type ttl"),
}
_PART["content"] = dict(_PART)  # the result of a tool: text or parts
_CALL = {
    **_values("id type index"),
    "function": {**_values("name arguments"), "arguments": DATA},
}
_MESSAGE = {
    **_values("role name tool_call_id reasoning reasoning_content refusal"),
    "content": _PART,
    "tool_calls": _CALL,
    "function_call": _values("name arguments"),
}
_FUNCTION = {**_values("name description strict"), "parameters": DATA}
_TOOL = {**_values("type defer_loading"), **_FUNCTION, "function": _FUNCTION}
_STRUCTURED = {
    **_values("regex choice grammar json_object whitespace_pattern"),
    **_values("disable_any_whitespace disable_additional_properties"),
    **dict.fromkeys(("json", "structural_tag"), DATA),
}
_FORMAT = {
    **_values("type name description strict"),
    **dict.fromkeys(("schema", "structures", "triggers", "format"), DATA),
    "json_schema": {**_values("name description strict"), "schema": DATA},
}
_TEMPLATE = {
    **_values("add_generation_prompt continue_final_message add_special_tokens chat_template"),
    "chat_template_kwargs": DATA,
}
_SAMPLING = {
    **_values("temperature top_p top_k min_p n seed stop stop_token_ids max_tokens min_tokens"),
    **_values("frequency_penalty presence_penalty repetition_penalty length_penalty"),
    **_values("use_beam_search ignore_eos include_stop_str_in_output skip_special_tokens"),
    **_values("spaces_between_special_tokens bad_words allowed_token_ids logprob_token_ids"),
    **_values("logprobs prompt_logprobs truncate_prompt_tokens truncation_side watermarking"),
    **_values("thinking_token_budget echo"),
    "logit_bias": DATA,
    "repetition_detection": _values("max_pattern_size min_pattern_size min_count"),
}
_GENERATING = {
    **_SAMPLING,
    **_values("model user stream stream_interval priority cache_salt"),
    **_values("return_token_ids return_tokens_as_token_ids"),
    "stream_options": _values("include_usage continuous_usage_stats"),
    "response_format": _FORMAT,
    "structured_outputs": _STRUCTURED,
}
_COMPLETION = {**_GENERATING, **_values("prompt suffix add_special_tokens best_of")}
_CHAT = {
    **_GENERATING,
    **_TEMPLATE,
    **_values("top_logprobs max_completion_tokens reasoning_effort include_reasoning"),
    **_values("parallel_tool_calls return_prompt_text"),
    "messages": _MESSAGE,
    "tools": _TOOL,
    "tool_choice": {**_values("type"), "function": _values("name")},
    "documents": DATA,
}
# In a Responses request: a message, a call, the result of a call, or reasoning, each with the fields
# that the engine returned before.
_RESPONSES_PART = {
    **_values("type text refusal detail image_url file_id file_url file_data filename"),
    "annotations": _values(
        "type title url index start_index end_index file_id filename container_id"
    ),
    "logprobs": {
        **_values("token logprob bytes"),
        "top_logprobs": _values("token logprob bytes"),
    },
}
_RESPONSES_ITEM = {
    **_values("type id role status phase call_id name namespace arguments input"),
    **_values("encrypted_content server_label error approval_request_id"),
    **dict.fromkeys(("content", "output", "summary"), _RESPONSES_PART),
}
_RESPONSES_TOOL = {
    **_values("type name description strict defer_loading server_label server_description"),
    "parameters": DATA,
    "format": _values("type syntax definition"),
    "allowed_tools": _values("tool_names read_only"),
    "search_context_size": VALUE,
    "container": _values("type"),
}
# A namespace holds functions.
_RESPONSES_TOOL["tools"] = dict(_RESPONSES_TOOL)
_RESPONSES = {
    **_values("model user stream store background truncation include service_tier priority"),
    **_values("instructions previous_response_id max_output_tokens max_tool_calls"),
    **_values("temperature top_p top_k min_p top_logprobs seed stop stop_token_ids ignore_eos"),
    **_values("presence_penalty frequency_penalty repetition_penalty skip_special_tokens"),
    **_values("include_stop_str_in_output include_reasoning parallel_tool_calls cache_salt"),
    **_values("prompt_cache_key watermarking enable_response_messages"),
    **dict.fromkeys(("metadata", "chat_template_kwargs", "logit_bias"), DATA),
    "input": _RESPONSES_ITEM,
    "tools": _RESPONSES_TOOL,
    "reasoning": _values("effort summary generate_summary"),
    "text": {**_values("verbosity"), "format": _FORMAT},
    "tool_choice": {
        **_values("type name mode server_label"),
        "tools": _values("type name server_label"),
    },
    "structured_outputs": _STRUCTURED,
}
_ANTHROPIC = {
    **_values("model"),
    "messages": {**_values("role"), "content": _PART},
    "system": _PART,
    "tools": {
        **_values("type name description"),
        "input_schema": DATA,
        "cache_control": _values("type ttl"),
    },
    "tool_choice": _values("type name disable_parallel_tool_use"),
    "thinking": _values("type budget_tokens display"),
    "output_config": {**_values("effort"), "format": _FORMAT},
    "chat_template_kwargs": DATA,
}
_MESSAGES = {
    **_ANTHROPIC,
    **_values("max_tokens stop_sequences stream temperature top_k top_p watermarking cache_salt"),
    "metadata": _values("user_id"),
}
_TOKENIZE = {
    **_TEMPLATE,
    **_values("model prompt return_token_strs"),
    "messages": _MESSAGE,
    "tools": _TOOL,
}

# The parameters of each path.
KNOWN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/tokenize": _TOKENIZE,
    "/detokenize": _values("model tokens"),
}


@dataclass(frozen=True)
class Accepted:
    """A request as it is passed on.

    Attributes:
        body: what was kept of it.
        content: the same as JSON text in UTF-8.
        left_out: paths of parameters that were not kept, such as ``tools.function.extra``; the first
            `MAX_LEFT_OUT` with at most `MAX_PATH` characters.
    """

    body: dict[str, Any]
    content: bytes
    left_out: tuple[str, ...]


def accepted(path: str, raw: bytes) -> Accepted:
    """What of a request reaches an engine.

    Args:
        path: one of `KNOWN`.
        raw: the request's body.

    Raises:
        Refused: with status 400, it is not a JSON object, or holds what JSON or UTF-8 cannot; with
            status 413, it holds more than `MAX_VALUES` values.
    """
    if _holds_too_many_values(raw):
        raise Refused(413, f"the request holds more than {MAX_VALUES} values")
    try:
        given = json.loads(raw, parse_constant=_no_number, parse_float=_finite)
    except Refused:
        raise
    except (ValueError, RecursionError):
        raise Refused(400, "the request's body is not JSON") from None
    if not isinstance(given, dict):
        raise Refused(400, "the request's body has to be a JSON object")
    known = KNOWN[path]
    left_out: dict[str, None] = {}
    body = _kept(given, known, "", left_out)
    try:
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise Refused(
            400, "a string of the request holds half of a surrogate pair, which is not text"
        ) from None
    except RecursionError:
        raise Refused(400, f"the request is nested more than {TOO_DEEP} levels deep") from None
    return Accepted(body, content, tuple(left_out))


def _kept(value: Any, known: Known, where: str, left_out: dict[str, None], depth: int = 1) -> Any:
    """A value without unknown parameters. Adds their paths to ``left_out``."""
    if depth > TOO_DEEP:
        raise Refused(400, f"the request is nested more than {TOO_DEEP} levels deep")
    if isinstance(value, list):
        return [_kept(one, known, where, left_out, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if isinstance(known, Value):
        raise Refused(400, f"{where} takes a value or a list of values, not an object")
    if isinstance(known, Data):
        return {name: _kept(one, known, where, left_out, depth + 1) for name, one in value.items()}
    kept = {}
    for name, one in value.items():
        path = f"{where}.{name}" if where else name
        if name in known:
            kept[name] = _kept(one, known[name], path, left_out, depth + 1)
        elif len(left_out) < MAX_LEFT_OUT and len(path) <= MAX_PATH:
            left_out[path] = None
    return kept


def _holds_too_many_values(raw: bytes) -> bool:
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) <= MAX_VALUES:
        return False
    values = 0
    for found in _STRING_OR_VALUE.finditer(raw):
        values += raw[found.start()] != ord('"')
        if values > MAX_VALUES:
            return True
    return False


def _no_number(name: str) -> Any:
    raise Refused(400, f"the request's body is not JSON: {name} is no number there")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Refused(400, f"the request holds a number that is too large: {text[:40]}")
    return number
