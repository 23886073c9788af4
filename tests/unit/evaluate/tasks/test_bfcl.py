"""BFCL v4: the package's own items, its checkers and its backends, without a model."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from example_counts import up_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixquant.evaluate.tasks import Item, Reply, TaskError, Verdict
from mixquant.evaluate.tasks.bfcl import WEIGHTS, BfclV4, decoded
from mixquant.evaluate.tasks.registry import task

bfcl_eval = pytest.importorskip("bfcl_eval")
DATA = Path(bfcl_eval.__file__).parent / "data"
SINGLE = [name for name in WEIGHTS if "multi_turn" not in name and "irrelevance" not in name]
SEVERAL = [name for name in WEIGHTS if "multi_turn" in name]


@pytest.fixture(scope="module")
def loaded() -> list[Item]:
    return task("bfcl-v4").load(None, cut=lambda text: text)


@pytest.fixture(scope="module")
def items(loaded: list[Item]) -> dict[str, list[Item]]:
    """Twenty of each category, out of the wheel."""
    return {
        category: [item for item in loaded if item.group == category][:20] for category in WEIGHTS
    }


def score(item: Item, calls: Sequence[tuple[str, Any]], text: str = "") -> Verdict:
    answer = {"text": text, "tool_calls": [call(*one) for one in calls]}
    return asyncio.run(BfclV4().score(item, answer))


def call(name: str, arguments: Any, id: str = "1") -> dict[str, Any]:
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def pick(options: list[Any], needed: bool = False) -> Any:
    """One of a parameter's possible values; None where it may be left out."""
    given = [option for option in options if option != ""]
    return plain(given[0]) if given and (needed or "" not in options) else None


def plain(value: Any, needed: Sequence[str] = ()) -> Any:
    if isinstance(value, dict):
        chosen = {key: pick(options, key in needed) for key, options in value.items()}
        return {key: one for key, one in chosen.items() if one is not None}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


def right_calls(item: Item) -> list[tuple[str, dict[str, Any]]]:
    needed = {
        tool["function"]["name"]: tool["function"]["parameters"].get("required", [])
        for tool in item.tools
    }
    calls = []
    for possible in item.reference["ground_truth"]:
        for dotted, parameters in possible.items():
            name = dotted.replace(".", "_")
            calls.append((name, plain(parameters, needed.get(name, ()))))
    return calls


def answerable(item: Item) -> bool:
    """Java's and JavaScript's literals stand in strings, which the possible answers show parsed."""
    if "java" not in item.group:
        return True
    return all(
        isinstance(value, str)
        for _, parameters in right_calls(item)
        for value in parameters.values()
    )


@pytest.mark.parametrize("category", SINGLE)
def test_possible_answers_are_right_and_changed_ones_wrong(
    items: dict[str, list[Item]], category: str
) -> None:
    tried = [item for item in items[category] if answerable(item)]
    assert len(tried) >= 5
    for item in tried:
        calls = right_calls(item)
        assert score(item, calls).score == 1, (item.id, calls, score(item, calls))
        name, parameters = calls[0]
        assert score(item, [(name + "x", parameters), *calls[1:]]).score == 0, item.id
        assert score(item, [*calls, calls[0]]).score == 0, item.id
        assert score(item, calls[1:]).score == 0, item.id
        assert score(item, [(name, {**parameters, "made_up": 1}), *calls[1:]]).score == 0, item.id
        assert score(item, [], "I would call " + name).score == 0, item.id
        assert score(item, [(name, "{not JSON"), *calls[1:]]).score == 0, item.id


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_where_no_function_helps_none_may_be_called(
    items: dict[str, list[Item]], category: str
) -> None:
    for item in items[category]:
        assert score(item, [], "None of these functions can do that.").score == 1
        assert score(item, [("anything", {"a": 1})]).score == 0
        assert score(item, [("anything", "{not JSON")]).score == 1  # not a call, says BFCL


def test_functions_become_openai_tools(items: dict[str, list[Item]]) -> None:
    for some in items.values():
        for item in some:
            for tool in item.tools:
                assert tool["type"] == "function"
                assert "." not in tool["function"]["name"]
                assert tool["function"]["parameters"]["type"] == "object"
            json.dumps(item.reference)
            assert item.messages or "multi_turn" in item.group


class Scripted:
    """A model that makes the calls it is given, all of a turn in one step, and then says so."""

    def __init__(self, turns: list[list[tuple[str, dict[str, Any]]]]) -> None:
        self.turns: list[Any] = [[turn, []] if turn else [[]] for turn in turns]
        self.steps = [step for turn in self.turns for step in turn]
        self.asked: list[list[dict[str, Any]]] = []
        self.tools: list[int] = []

    async def ask(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[Any] = (),
        seed: int | None = None,
    ) -> Reply:
        self.asked.append(copy.deepcopy(list(messages)))
        self.tools.append(len(tools))
        calls = self.steps[min(len(self.asked), len(self.steps)) - 1]
        return Reply(
            "" if calls else "<think>hm</think>Done.",
            tool_calls=tuple(
                call(one[0], one[1], id=str(number)) for number, one in enumerate(calls)
            ),
        )


def parsed(item: Item, text: str) -> tuple[str, dict[str, Any]]:
    """A call out of BFCL's ground truth, its positional arguments by name."""
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    functions = [*item.reference["function"]]
    for later in item.reference["missed_function"].values():
        functions += later
    (names,) = [
        list(one["parameters"]["properties"]) for one in functions if one["name"] == node.func.id
    ]
    arguments = dict(zip(names, map(ast.literal_eval, node.args), strict=False))
    arguments |= {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg}
    return node.func.id, arguments


def conversation(item: Item) -> list[list[tuple[str, dict[str, Any]]]]:
    return [[parsed(item, text) for text in turn] for turn in item.reference["ground_truth"]]


def play(item: Item, model: Scripted) -> tuple[dict[str, Any], Verdict]:
    async def both() -> tuple[dict[str, Any], Verdict]:
        answer = await BfclV4().run(item, model, seed=0)  # type: ignore[arg-type]
        return answer, await BfclV4().score(item, json.loads(json.dumps(answer)))

    return asyncio.run(both())


@pytest.mark.parametrize("category", SEVERAL)
def test_the_right_conversation_is_right_and_a_changed_one_wrong(
    items: dict[str, list[Item]], category: str
) -> None:
    for item in items[category][:6]:
        turns = conversation(item)
        answer, verdict = play(item, Scripted(turns))
        assert verdict.score == 1, (item.id, verdict)
        assert [len(turn["steps"]) for turn in answer["turns"]] == [2 if t else 1 for t in turns]
        nothing: list[Any] = [[] for _ in turns]
        assert play(item, Scripted(nothing))[1].score == 0, item.id
        first = next(place for place, turn in enumerate(turns) if turn)
        made_up = [*turns[:first], [("no_such_function", {"a": 1})], *turns[first + 1 :]]
        assert play(item, Scripted(made_up))[1].score == 0, item.id


def test_what_a_model_reads_in_a_conversation(items: dict[str, list[Item]]) -> None:
    item = next(
        item for item in items["multi_turn_miss_func"] if item.id == "multi_turn_miss_func_0"
    )
    model = Scripted(conversation(item))
    play(item, model)
    last = model.asked[-1]
    users = [message["content"] for message in last if message["role"] == "user"]
    assert len(users) == 5
    assert users[3] == "I have updated some more functions you can choose from. What about now?"
    assert model.tools[-1] == model.tools[0] + 1
    results = [message for message in last if message["role"] == "tool"]
    assert results[0]["tool_call_id"] == "0"
    assert json.loads(results[0]["content"]) == {"current_working_directory": "document"}
    spoken = [message["content"] for message in last if message["role"] == "assistant"]
    assert "Done." in spoken
    assert not any("<think>" in text for text in spoken)


def test_a_model_that_never_stops_is_stopped(items: dict[str, list[Item]]) -> None:
    item = items["multi_turn_base"][0]
    model = Scripted([[("pwd", {})]])
    model.steps = [[("pwd", {})]]
    answer, verdict = play(item, model)
    assert len(model.asked) == 21
    assert answer["turns"][-1]["forced"]
    assert (verdict.score, verdict.detail) == (0, "the conversation was ended by force")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("open", {"file": "hacked", "mode": "w"}),
        ("__import__('os').system('touch hacked') or pwd", {}),
        ("pwd", {"a=open('hacked', 'w'), b": 1}),
        ("pwd", {"lambda": 1}),
        ("_load_scenario", {"scenario": {}}),
        ("pwd", {"": 1}),
    ],
)
def test_what_a_model_calls_is_never_run_as_code(
    items: dict[str, list[Item]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    item = items["multi_turn_base"][0]
    model = Scripted([[(name, arguments)], *conversation(item)[1:]])
    _, verdict = play(item, model)
    assert verdict.score == 0
    (result,) = [message for message in model.asked[1] if message["role"] == "tool"]
    assert result["content"].startswith("Error during execution")
    assert list(tmp_path.iterdir()) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=up_to(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), arguments=VALUES | st.text(), category=st.sampled_from(sorted(WEIGHTS)))
def test_no_call_raises(
    items: dict[str, list[Item]], data: st.DataObject, arguments: Any, category: str
) -> None:
    item = items[category][0]
    names = [tool["function"]["name"] for tool in item.tools]
    name = data.draw(st.sampled_from(names) | st.text(max_size=8))
    made = call(name, arguments)
    answer = {"text": "", "tool_calls": [made], "turns": [{"steps": [{"tool_calls": [made]}]}] * 4}
    assert asyncio.run(BfclV4().score(item, answer)).score in (0, 1)
    assert asyncio.run(BfclV4().score(item, {"text": "x", "turns": None})).score in (0, 1)


def test_calls_whose_arguments_are_no_object_are_none() -> None:
    assert decoded([call("f", "[1]")]) is None
    assert decoded([call("f", {"a": 1}), call("f", "{")]) is None
    assert decoded([{"function": {}}]) is None
    assert decoded([call("f", {"a": 1})]) == [{"name": "f", "arguments": {"a": 1}}]
    assert decoded([]) == []


def test_the_first_items_are_of_every_category(loaded: list[Item]) -> None:
    assert {item.group for item in loaded[: len(WEIGHTS)]} == set(WEIGHTS)
    assert len(loaded) == 4425
    assert sum(WEIGHTS.values()) == pytest.approx(60)


def excerpt(tmp_path: Path, category: str, question: Any, answer: Any = None) -> Path:
    (tmp_path / "possible_answer").mkdir(exist_ok=True)
    path = tmp_path / f"BFCL_v4_{category}.json"
    path.write_text(json.dumps(question) + "\n")
    if answer is not None:
        (tmp_path / "possible_answer" / path.name).write_text(json.dumps(answer) + "\n")
    return path


QUESTION = {
    "id": "simple_python_0",
    "question": [[{"role": "user", "content": "5!"}]],
    "function": [
        {
            "name": "math.factorial",
            "description": "n!",
            "parameters": {
                "type": "dict",
                "properties": {"number": {"type": "integer", "description": "n"}},
                "required": ["number"],
            },
        }
    ],
}
POSSIBLE = {"id": "simple_python_0", "ground_truth": [{"math.factorial": {"number": [5]}}]}


def test_data_of_the_user(tmp_path: Path) -> None:
    path = excerpt(tmp_path, "simple_python", QUESTION, POSSIBLE)
    for data in (path, tmp_path):
        (item,) = task("bfcl-v4").load(data, cut=lambda text: text)
        assert item.tools[0]["function"]["name"] == "math_factorial"
        assert score(item, [("math_factorial", {"number": 5})]).score == 1
        assert score(item, [("math_factorial", {"number": 6})]).score == 0


@pytest.mark.parametrize(
    ("category", "question", "answer", "message"),
    [
        ("simple_python", {**QUESTION, "question": []}, POSSIBLE, "line 1: field 'question'"),
        ("simple_python", QUESTION, {**POSSIBLE, "id": "x"}, "possible_answer/.* has none"),
        ("simple_python", QUESTION, None, "cannot read .*possible_answer.*No such file"),
        ("simple_python", {**QUESTION, "function": []}, POSSIBLE, "field 'function'"),
        ("web_search", QUESTION, POSSIBLE, "expected a name BFCL_v4_CATEGORY.json"),
        (
            "multi_turn_base",
            {**QUESTION, "involved_classes": ["NoSuchAPI"]},
            {**POSSIBLE, "ground_truth": [["pwd()"]]},
            "id 'simple_python_0' does not begin with 'multi_turn_base'",
        ),
    ],
)
def test_wrong_data_is_refused(
    tmp_path: Path, category: str, question: Any, answer: Any, message: str
) -> None:
    path = excerpt(tmp_path, category, question, answer)
    with pytest.raises(TaskError, match=message) as caught:
        task("bfcl-v4").load(path, cut=lambda text: text)
    assert "\n" not in str(caught.value)


def test_a_directory_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"holds no BFCL_v4_CATEGORY\.json"):
        task("bfcl-v4").load(tmp_path, cut=lambda text: text)
