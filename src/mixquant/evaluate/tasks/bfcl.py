"""BFCL v4, the Berkeley Function Calling Leaderboard: calls of functions, in one turn and in several.

The data, the checkers and the simulated backends are those of the package `bfcl-eval`. Left out are
its agentic categories: ``web_search``, which needs a paid search service, and ``memory``, whose
backends need an embedding model and a run over earlier conversations for each model; and
``live_relevance`` and ``format_sensitivity``, which have no part in the score.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mixquant.evaluate.tasks import (
    Answer,
    Chat,
    Cut,
    Item,
    Message,
    Reply,
    Task,
    TaskError,
    Verdict,
)
from mixquant.evaluate.tasks import bfcl_backend as backend
from mixquant.evaluate.tasks.extraction import strip_thinking
from mixquant.evaluate.tasks.isolation import IsolationError, isolated, isolated_now
from mixquant.evaluate.tasks.records import DataRecord, read_records, unique

PACKAGE = "bfcl-eval==2026.3.23"

# What each category counts: 30 % several turns, 10 % each of one turn, of one turn asked by real
# users ("live", whose categories count by their size), and of calls that should not be made; as
# bfcl_eval.eval_checker.eval_runner_helper has it, without the 40 % of the categories left out.
WEIGHTS: Mapping[str, float] = {
    "simple_python": 10 / 12,
    "simple_java": 10 / 12,
    "simple_javascript": 10 / 12,
    "multiple": 10 / 4,
    "parallel": 10 / 4,
    "parallel_multiple": 10 / 4,
    "live_simple": 10 * 258 / 1351,
    "live_multiple": 10 * 1053 / 1351,
    "live_parallel": 10 * 16 / 1351,
    "live_parallel_multiple": 10 * 24 / 1351,
    "irrelevance": 10 / 2,
    "live_irrelevance": 10 / 2,
    "multi_turn_base": 30 / 4,
    "multi_turn_miss_func": 30 / 4,
    "multi_turn_miss_param": 30 / 4,
    "multi_turn_long_context": 30 / 4,
}
_MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
_SECONDS = 30.0  # of a whole conversation in the backends


class _Question(DataRecord):
    id: str = Field(min_length=1)
    question: list[list[dict[str, Any]]] = Field(min_length=1)
    function: list[dict[str, Any]] = Field(default_factory=list)
    initial_config: dict[str, Any] = Field(default_factory=dict)
    involved_classes: list[str] = Field(default_factory=list)
    missed_function: dict[str, list[str]] = Field(default_factory=dict)


class _PossibleAnswer(DataRecord):
    id: str
    ground_truth: list[Any]


class BfclV4(Task):
    """4,425 questions in 16 categories, out of the package ``bfcl-eval``.

    ``--data`` names a file ``BFCL_v4_CATEGORY.json`` with its possible answers in
    ``possible_answer/`` beside it, or a directory of such files. Calls are made through OpenAI's
    ``tools``; the server has to parse them (vLLM: ``--enable-auto-tool-choice --tool-call-parser``).
    """

    name = "bfcl-v4"
    needs_tools = True
    weights: ClassVar[Mapping[str, float]] = WEIGHTS

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        found = importlib.util.find_spec("bfcl_eval")
        if found is None or not found.submodule_search_locations:
            raise TaskError(
                f"bfcl-v4 needs bfcl-eval: pip install --no-deps {PACKAGE} (what it depends on "
                "clashes with vLLM and is not used)"
            )
        source = data or Path(found.submodule_search_locations[0]) / "data"
        by_category = [_entries(path, category) for category, path in _files(source)]
        # One category after the other, so that a limited run has items of every category.
        entries = [
            entry
            for some in itertools.zip_longest(*by_category)
            for entry in some
            if entry is not None
        ]
        unique([entry["id"] for entry in entries], data)
        try:
            ready = isolated_now(backend.prepared, entries, seconds=300)
        except IsolationError as error:
            raise TaskError(f"{source}: bfcl-eval does not take it: {error}") from None
        return [_item(entry) for entry in ready]

    async def run(self, item: Item, chat: Chat, seed: int, judge: Chat | None = None) -> Answer:
        if not item.group.startswith("multi_turn"):
            return await super().run(item, chat, seed, judge)
        return {"turns": [turn async for turn in _turns(item, chat, seed)]}

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        entry = item.reference
        try:
            if item.group.startswith("multi_turn"):
                right, why = await _score_turns(entry, answer.get("turns"))
            elif "irrelevance" in item.group:
                made = bool(decoded(answer.get("tool_calls") or []))
                right, why = not made, f"made {'a' if made else 'no'} call"
            else:
                calls = decoded(answer.get("tool_calls") or [])
                if not calls:
                    why = "made no call, or none whose arguments are an object"
                    return Verdict(0.0, why, extracted=False)
                right, why = await isolated(backend.calls_are_right, entry, calls)
        except IsolationError as error:
            return Verdict(0.0, f"the calls could not be checked: {error}")
        return Verdict(float(right), why)


def decoded(tool_calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Calls with their arguments as objects; None if the arguments of one are not, because then
    none counts."""
    calls = []
    for call in tool_calls:
        try:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append({"name": name, "arguments": arguments})
    return calls


async def _turns(item: Item, chat: Chat, seed: int) -> Any:
    """Each turn's steps: a reply's text and calls, and whether the turn was ended by force."""
    entry = item.reference
    messages: list[Message] = []
    tools = list(item.tools)
    steps: list[list[dict[str, Any]]] = []  # the calls of all turns so far
    for number, question in enumerate(entry["question"]):
        later = entry["later_tools"].get(str(number))
        if later:
            tools += later
            question = [{"role": "user", "content": _MORE_FUNCTIONS}]
        messages += question
        turn: dict[str, Any] = {"steps": [], "forced": False}
        while True:
            reply = await chat.ask(messages, tools=tools, seed=seed)
            messages.append(_assistant(reply))
            turn["steps"].append({"text": reply.text, "tool_calls": list(reply.tool_calls)})
            calls = decoded(reply.tool_calls)
            if not calls:
                break
            try:
                results = await isolated(backend.executed, entry, [*steps, calls], seconds=_SECONDS)
                steps.append(calls)
            except IsolationError as error:
                results = [f"Error during execution: {error}"] * len(calls)
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": result}
                for call, result in zip(reply.tool_calls, results, strict=True)
            ]
            if len(turn["steps"]) > backend.MAXIMUM_STEPS:
                turn["forced"] = True
                break
        yield turn
        if turn["forced"]:
            return


def _assistant(reply: Reply) -> Message:
    message: Message = {"role": "assistant", "content": strip_thinking(reply.text)}
    if reply.tool_calls:
        message["tool_calls"] = list(reply.tool_calls)
    return message


async def _score_turns(entry: dict[str, Any], turns: Any) -> tuple[bool, str]:
    if not isinstance(turns, list) or len(turns) != len(entry["ground_truth"]):
        return False, "the conversation was ended by force"
    made = [
        [calls for step in turn["steps"] if (calls := decoded(step["tool_calls"]))]
        for turn in turns
    ]
    right, why = await isolated(backend.turns_are_right, entry, made, seconds=_SECONDS)
    return bool(right), str(why)


def _files(source: Path) -> Iterator[tuple[str, Path]]:
    if os.path.isdir(source):
        found = [
            (category, path)
            for category in WEIGHTS
            if (path := source / f"BFCL_v4_{category}.json").is_file()
        ]
        if not found:
            raise TaskError(f"{source} holds no BFCL_v4_CATEGORY.json of a known category")
        yield from found
        return
    category = source.stem.removeprefix("BFCL_v4_")
    if category not in WEIGHTS:
        raise TaskError(
            f"{source}: expected a name BFCL_v4_CATEGORY.json, of a category among {', '.join(WEIGHTS)}"
        )
    yield category, source


def _entries(path: Path, category: str) -> list[dict[str, Any]]:
    answers: dict[str, list[Any]] = {}
    if "irrelevance" not in category:
        known = read_records(path.parent / "possible_answer" / path.name, _PossibleAnswer)
        answers = {record.id: record.ground_truth for record in known}
    entries = []
    for record in read_records(path, _Question):
        if not record.id.startswith(category):  # bfcl-eval tells categories by ids
            raise TaskError(f"{path}: id {record.id!r} does not begin with {category!r}")
        if "irrelevance" not in category and record.id not in answers:
            raise TaskError(f"{path}: question {record.id}: possible_answer/{path.name} has none")
        if category.startswith("multi_turn"):
            if len(answers[record.id]) != len(record.question):
                raise TaskError(
                    f"{path}: question {record.id}: {len(record.question)} turns, but answers to "
                    f"{len(answers[record.id])}"
                )
        elif "irrelevance" not in category and not record.function:
            raise TaskError(f"{path}: question {record.id}: field 'function': expected functions")
        entry = record.model_dump()
        entry |= {"category": category, "ground_truth": answers.get(record.id, [])}
        entries.append(entry)
    return entries


def _item(entry: dict[str, Any]) -> Item:
    tools = tuple(entry.pop("tools"))
    return Item(
        id=entry["id"],
        messages=tuple(entry["question"][0]),
        reference=entry,
        tools=tools,
        group=entry["category"],
    )
