"""How a benchmark is asked: sampling, seeds, and how long a prompt may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mixquant.conversation import render
from mixquant.evaluate.benchmarks.chat import sampling
from mixquant.evaluate.tasks import Task, TaskError
from mixquant.evaluate.tasks.cutting import cut_middle

# For the instructions and the question around a text that is cut.
_AROUND = 512


@dataclass(frozen=True)
class Settings:
    """The settings of the paper (arXiv 2605.20315), unless a benchmark or the user sets others."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 32768  # of an answer with its reasoning
    thinking: bool = True
    seeds: int = 1
    context_tokens: int | None = None  # prompts are cut to this in the middle; None: no cut

    @classmethod
    def of(cls, task: Task, given: Mapping[str, Any], context: int | None) -> Settings:
        """Those of a benchmark, with what the user gave, in a model of this context."""
        chosen = {key: value for key, value in given.items() if value is not None}
        settings = replace(cls(), **{**task.defaults, **chosen})
        if context is not None and settings.max_tokens >= context:
            settings = replace(settings, max_tokens=max(context // 2, 1))
        return settings

    @property
    def sampling(self) -> dict[str, Any]:
        return sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            thinking=self.thinking,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MiddleCutter:
    """Cuts texts in their middle, by the model's tokenizer; see `mixquant.evaluate.tasks.Cut`.

    Args:
        settings: of the benchmark.
        context: of the model, in tokens; None: unknown.
        load_tokenizer: is called when the first text is long enough to need it.
    """

    def __init__(
        self, settings: Settings, context: int | None, load_tokenizer: Callable[[], Any]
    ) -> None:
        self._settings = settings
        self._context = context
        self._load = load_tokenizer
        self._tokenizer: Any = None
        self._limit = 0

    def __call__(self, text: str) -> str:
        if self._settings.context_tokens is None:
            return text
        if self._tokenizer is None:
            self._tokenizer = self._load()
            self._limit = self._prompt_budget()
        return cut_middle(text, self._tokenizer, self._limit)

    def _prompt_budget(self) -> int:
        assert self._settings.context_tokens is not None
        if self._context is None:
            return self._settings.context_tokens
        answer = self._settings.max_tokens
        budget = self._context - answer - self._of_template() - _AROUND
        if budget < 1:
            raise TaskError(
                f"the model reads and writes {self._context} tokens, which leaves no room for a prompt "
                f"beside an answer of {answer}: give a smaller --max-tokens"
            )
        return min(self._settings.context_tokens, budget)

    def _of_template(self) -> int:
        text = render(self._tokenizer, [{"role": "user", "content": ""}])
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
