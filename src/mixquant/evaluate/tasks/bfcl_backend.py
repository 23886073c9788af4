"""BFCL's own checkers and simulated backends, from the package `bfcl-eval`, as worker processes run
them.

The package evaluates calls as Python text. Names that a model made up stop here: a call whose
function is not a backend's, or whose arguments are not names, is replaced by one that fails.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import json
import keyword
import os
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from mixquant.files.cache import cache_dir

Call = Mapping[str, Any]  # name, arguments: an object

MAXIMUM_STEPS = 20  # of one turn, as in bfcl_eval.constants.default_prompts
_MODEL = "mixquant"
_FAILS = "unknown_function()"


def prepared(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with what they need to be asked: ``function``, as BFCL documents it; OpenAI's
    ``tools``; and for functions that come later, ``later_tools`` by turn."""
    with _quiet():
        utils = _module("utils")
        known = list(utils.populate_test_cases_with_predefined_functions(list(entries)))
        # What the model reads names the language, and has every Java type as a string; the checker
        # wants the functions without that.
        hinted = utils.add_language_specific_hint_to_function_doc(copy.deepcopy(known))
        for entry, shown in zip(known, hinted, strict=True):
            entry["tools"] = _tools(shown["function"])
            entry["later_tools"] = {
                turn: _tools(functions) for turn, functions in shown["missed_function"].items()
            }
    return known


def _tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    handler, mappings = _module("model_handler.utils"), _module("constants.type_mappings")
    style = _module("constants.enums").ModelStyle.OPENAI_COMPLETIONS
    tools = handler.convert_to_tool(list(functions), mappings.GORILLA_TO_OPENAPI, style)
    for tool in tools:
        tool["function"].pop("response", None)  # not part of OpenAI's schema
    return list(tools)


def executed(entry: Mapping[str, Any], steps: Sequence[Sequence[Call]]) -> list[str]:
    """The results of the calls of the last step, after all calls before it.

    All calls are executed again on new backends. Their random numbers are seeded, so the results
    are the same, and no state has to survive a worker.
    """
    results: list[str] = []
    with _quiet(), _backends(entry) as (execute, methods):
        for calls in steps:
            results = execute([_as_text(call, methods) for call in calls])
    return results


def calls_are_right(entry: Mapping[str, Any], calls: Sequence[Call]) -> tuple[bool, str]:
    """Whether the calls of a single turn are among the possible answers."""
    with _quiet():
        checker, enums = _module("eval_checker.ast_eval.ast_checker"), _module("constants.enums")
        # OpenAI's function names have no dots: the checker is told that they became underscores.
        vars(checker)["MODEL_CONFIG_MAPPING"] = _EveryModel()
        category = entry["category"]
        language = enums.Language.PYTHON
        if category == "simple_java":
            language = enums.Language.JAVA
        elif category == "simple_javascript":
            language = enums.Language.JAVASCRIPT
        result = checker.ast_checker(
            entry["function"],
            [{call["name"]: call["arguments"]} for call in calls],
            entry["ground_truth"],
            language,
            category,
            _MODEL,
        )
    return bool(result["valid"]), _one_line(result.get("error", ""))


def turns_are_right(
    entry: Mapping[str, Any], turns: Sequence[Sequence[Sequence[Call]]]
) -> tuple[bool, str]:
    """Whether a conversation left the backends in the right state after each turn, and learned what
    it had to."""
    with _quiet(), _backends(entry) as (_, methods):
        checker = _module("eval_checker.multi_turn_eval.multi_turn_checker")
        result = checker.multi_turn_checker(
            [[[_as_text(call, methods) for call in step] for step in turn] for turn in turns],
            entry["ground_truth"],
            dict(entry),
            entry["category"],
            _MODEL,
        )
    return bool(result["valid"]), _one_line(result.get("error_message", ""))


def _as_text(call: Call, methods: frozenset[str]) -> str:
    name, arguments = call["name"], call["arguments"]
    if name not in methods:
        return _FAILS
    if not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        return _FAILS
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"


@contextlib.contextmanager
def _backends(entry: Mapping[str, Any]) -> Iterator[tuple[Any, frozenset[str]]]:
    """A function that executes calls on new backends, and the backends' methods."""
    utils = _module("eval_checker.multi_turn_eval.multi_turn_utils")
    before = set(vars(utils))

    def execute(calls: list[str]) -> list[str]:
        results, _ = utils.execute_multi_turn_func_call(
            calls,
            entry["initial_config"],
            entry["involved_classes"],
            _MODEL,
            entry["id"],
            long_context="long_context" in entry["category"],
            is_evaL_run=False,
        )
        return list(results)

    paths = _module("constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    methods = frozenset(
        name
        for cls in entry["involved_classes"]
        for name, _ in inspect.getmembers(
            getattr(importlib.import_module(paths[cls]), cls), inspect.isfunction
        )
        if not name.startswith("_")
    )
    try:
        yield execute, methods
    finally:
        # The package keeps backends as global variables of that module, for ever.
        for name in set(vars(utils)) - before:
            delattr(utils, name)


class _EveryModel:
    def __getitem__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(underscore_to_dot=True)


@functools.cache
def _module(name: str) -> ModuleType:
    from mixquant.evaluate.tasks.stand_ins import stand_ins

    # Where the package makes folders for its results when it is imported; by default, beside itself.
    os.environ["BFCL_PROJECT_ROOT"] = str(cache_dir() / "bfcl-eval")
    with stand_ins(
        "bfcl_eval.constants.model_config",
        "bfcl_eval.model_handler.parser.java_parser",
        "bfcl_eval.model_handler.parser.js_parser",
        "tenacity",
    ):
        return importlib.import_module(f"bfcl_eval.{name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _one_line(error: Any) -> str:
    text = error if isinstance(error, str) else json.dumps(error, default=str)
    return " ".join(text.split())[:300]
