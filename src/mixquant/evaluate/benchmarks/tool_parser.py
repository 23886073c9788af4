"""The parser of tool calls that an arm's server needs for a benchmark with tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

from mixquant.checkpoints.models import Checkpoint
from mixquant.evaluate.tasks import TaskError
from mixquant.serve.parsers import is_known, parser_for
from mixquant.servers.arms import ServedArm

_PARSER = "--tool-call-parser"
_CHOICE = "--enable-auto-tool-choice"


def with_tool_parser(
    arm: ServedArm, checkpoint: Checkpoint, benchmark: str, note: Callable[[str], None]
) -> ServedArm:
    """The arm with a parser of tool calls: the one that its arguments name, or the one that fits.

    Without a parser, vLLM refuses requests with tools, or passes calls on as text, minutes after
    the start.

    Args:
        arm: one whose server is started for this.
        benchmark: that needs it, for messages.
        note: is told of a parser that is chosen here.

    Raises:
        TaskError: no parser is named and none fits the model's chat template, or vLLM has none of the
            name given.
    """
    named = _value(arm.arguments, _PARSER)
    added = [] if _CHOICE in map(_spelled, arm.arguments) else [_CHOICE]
    if named is not None:
        has_plugin = _value(arm.arguments, "--tool-parser-plugin") is not None
        if not has_plugin and not is_known("tool", named):
            raise TaskError(
                f"{benchmark}: {arm.name}: vLLM has no tool-call parser {named!r}; "
                "vllm serve --help=tool-call-parser lists them"
            )
        return replace(arm, arguments=(*arm.arguments, *added))
    found = parser_for("tool", checkpoint.source, str(checkpoint.config.get("model_type")))
    if found is None:
        raise TaskError(
            f"{benchmark} needs tool calls, and no parser is known for the chat template of "
            f"{checkpoint.name}: name vLLM's with --vllm-args '{_PARSER} NAME'"
        )
    note(f"{arm.name}: tool calls are parsed as {found}, by the chat template")
    return replace(arm, arguments=(*arm.arguments, *added, _PARSER, found))


def _spelled(argument: str) -> str:
    """An option as vLLM reads it: underscores are dashes."""
    return argument.partition("=")[0].replace("_", "-")


def _value(arguments: Sequence[str], option: str) -> str | None:
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("--") and _spelled(argument) == option:
            return argument.partition("=")[2] or following
    return None
