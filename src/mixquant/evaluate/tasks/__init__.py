"""The interface of a benchmark: items to ask, and the score of an answer to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mixquant.errors import MixquantError

Message = dict[str, Any]  # of OpenAI's chat API
Answer = dict[str, Any]  # JSON; of one request: a `Reply`'s fields

Cut = Callable[[str], str]
"""Shortens a text in its middle to what the benchmark's ``context_tokens`` and the model leave room
for; a text that fits comes back as it is. Some 500 tokens are left for what stands around it."""


OPTIONS = {
    "lengths": "--length",
    "cot": "--cot",
    "no_context": "--no-context",
    "retrieved": "--retrieved",
}
"""Options of `mixquant evaluate` that only some benchmarks take: the keyword, and the option's name."""


class TaskError(MixquantError, ValueError):
    """A benchmark that cannot be run. The message is one line: which file, line and field, and what
    was expected; or what to install."""


class JudgeError(RuntimeError):
    """The judge gave no verdict. The answer is kept and judged again in the next run."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str  # unique and stable within its benchmark
    messages: tuple[Message, ...]  # already cut to the context
    reference: Any  # JSON; what the scorer needs
    tools: tuple[dict[str, Any], ...] = ()  # OpenAI tool schemas
    group: str = ""  # category, for sub-scores
    also: tuple[str, ...] = ()  # further groups that have sub-scores


@dataclass(frozen=True)
class Reply:
    """The answer of a model to one request."""

    text: str  # without reasoning
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()  # OpenAI's: id, type, function (name, arguments)
    finish: str = "stop"  # stop, length, tool_calls


@dataclass(frozen=True)
class Verdict:
    """The score of an answer."""

    score: float  # 0 to 1
    detail: str = ""  # the reason, for readers of the answer file
    extracted: bool = True  # False: nothing was found in the answer that could be right or wrong


@dataclass(frozen=True)
class PromptLimits:
    """The size that a prompt may have, for benchmarks that make prompts of a given length."""

    tokens: Callable[[str], int]  # of a prompt of one message with this text, by the chat template
    context: int | None  # of the model, in tokens: prompt and answer together; None: unknown
    answer: int  # the most tokens of an answer


class Chat(Protocol):
    """A model behind an OpenAI-compatible server, with the run's sampling settings.

    Requests that fail are retried with backoff, and counted for the item that they are made for.
    """

    @property
    def url(self) -> str:
        """With /v1."""

    @property
    def key(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Of each request: temperature, top_p, max_tokens, extra_body; of a judge: nothing."""

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        seed: int | None = None,
        **options: Any,
    ) -> Reply:
        """One request; ``options`` go before the run's.

        Raises:
            mixquant.evaluate.benchmarks.chat.ChatError: it failed in the end.
        """
        ...


class Task:
    """A benchmark. Subclasses load its items and score answers; what they raise for bad input is
    `TaskError`.

    Attributes:
        needs_judge: whether ``run`` or ``score`` asks a second model (a judge, a simulated user).
        needs_tools: whether requests offer tools, whose calls the server has to parse.
        defaults: what the benchmark changes of the run's settings: ``seeds`` (how many),
            ``max_tokens``, ``context_tokens`` (what `Cut` leaves of a text), ``temperature``,
            ``top_p``, ``top_k``, ``thinking``, ``first_seed``, ``special_tokens``.
        weights: how much each group counts in the score, whatever its number of items; empty: every
            item counts alike.
        in_turns: whether a limited run draws from one group after the other.
        order: of the groups in tables; those that are not named follow as they come.
        options: what the constructor takes, by keyword: a name of `OPTIONS` each.
        limits: what a prompt may be; given before ``load``.
        cuts_prompts: whether ``load`` cuts whole prompts, with nothing of the benchmark's around them.
    """

    name: ClassVar[str]
    needs_judge: ClassVar[bool] = False
    needs_tools: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}
    weights: ClassVar[Mapping[str, float]] = {}
    in_turns: ClassVar[bool] = False
    order: ClassVar[Sequence[str]] = ()
    options: ClassVar[frozenset[str]] = frozenset()
    limits: PromptLimits | None = None
    cuts_prompts: ClassVar[bool] = False

    def defaults_for(self, model: str) -> Mapping[str, Any]:
        """`defaults`, where they depend on the model: those of this one.

        Args:
            model: its names.
        """
        return self.defaults

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        """All items, in an order that does not change.

        Args:
            data: a file of the user's in the published schema; None: from the Hub, or from the
                package that ships it.
            cut: for texts that may be too long. Only tasks that cut need the model's tokenizer.

        Raises:
            TaskError: no such file, a wrong schema, or a package is missing.
        """
        raise NotImplementedError

    async def run(self, item: Item, chat: Chat, seed: int, judge: Chat | None = None) -> Answer:
        """The answer to an item, as JSON: of one request, unless a subclass makes several.

        Args:
            judge: plays the user where a benchmark simulates one.
        """
        reply = await chat.ask(item.messages, tools=item.tools, seed=seed)
        return {
            "text": reply.text,
            "reasoning": reply.reasoning,
            "tool_calls": list(reply.tool_calls),
            "finish": reply.finish,
        }

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        """The score of an answer.

        Runs in the event loop: work that takes more than about ten milliseconds belongs in
        `asyncio.to_thread`.

        Raises:
            JudgeError: the judge said neither yes nor no.
        """
        raise NotImplementedError
