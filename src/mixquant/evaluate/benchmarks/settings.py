"""How a benchmark is asked: sampling, seeds, and how long a prompt may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mixquant.checkpoints.errors import ModelError
from mixquant.conversation import render
from mixquant.evaluate.benchmarks.chat import sampling
from mixquant.evaluate.tasks import Task, TaskError
from mixquant.evaluate.tasks.cutting import cut_middle

# For the instructions and the question around a text that is cut.
_AROUND = 512
_EMPTY = [{"role": "user", "content": ""}]
_TEMPLATE_ESTIMATE = 64  # tokens around a message, a system prompt among them
_PIECES = re.compile(r"[^\W\d_]+|\d|([^\w\s])\1*|_|\n")


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
    first_seed: int = 0  # the others follow it
    special_tokens: bool = False  # whether answers keep them, for thoughts that are marked by some

    @classmethod
    def of(
        cls, task: Task, given: Mapping[str, Any], context: int | None, model: str = ""
    ) -> Settings:
        """Those of a benchmark, with what the user gave, in a model of these names and this context."""
        chosen = {key: value for key, value in given.items() if value is not None}
        settings = replace(cls(), **{**task.defaults_for(model), **chosen})
        if context is not None and settings.max_tokens >= context:
            settings = replace(settings, max_tokens=max(context // 2, 1))
        return settings

    @property
    def sampling(self) -> dict[str, Any]:
        options = sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            thinking=self.thinking,
        )
        if self.special_tokens:
            options["extra_body"]["skip_special_tokens"] = False
        return options

    def to_dict(self) -> dict[str, Any]:
        """All fields; of those that only protocols change, the ones that they have changed."""
        usual = {"first_seed": 0, "special_tokens": False}
        return {key: value for key, value in asdict(self).items() if usual.get(key, ...) != value}


class MiddleCutter:
    """Cuts texts in their middle, by the model's tokenizer; see `mixquant.evaluate.tasks.Cut`.

    Args:
        settings: of the benchmark.
        context: of the model, in tokens; None: unknown.
        load_tokenizer: is called when the first text is long enough to need it.
        around: tokens to leave for what stands around a text.
    """

    def __init__(
        self,
        settings: Settings,
        context: int | None,
        load_tokenizer: Callable[[], Any],
        around: int = _AROUND,
    ) -> None:
        self._around = around
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
        budget = self._context - answer - self._of_template() - self._around
        if budget < 1:
            raise TaskError(
                f"the model reads and writes {self._context} tokens, which leaves no room for a prompt "
                f"beside an answer of {answer}: give a smaller --max-tokens"
            )
        return min(self._settings.context_tokens, budget)

    def _of_template(self) -> int:
        return _count(self._tokenizer, render(self._tokenizer, _EMPTY))


class PromptTokens:
    """Counts the tokens of prompts, by the model's tokenizer and chat template; see `PromptLimits`.

    Where this machine has no tokenizer of the model, the number is estimated.

    Args:
        load_tokenizer: is called when the first prompt is counted.
        note: is told of an estimate, once.
    """

    def __init__(self, load_tokenizer: Callable[[], Any], note: Callable[[str], None]) -> None:
        self._load = load_tokenizer
        self._note = note
        self._tokenizer: Any = None
        self._template: int | None = None  # tokens around a message

    def __call__(self, text: str) -> int:
        if self._template is None:
            try:
                self._tokenizer = self._load()
                self._template = _count(self._tokenizer, render(self._tokenizer, _EMPTY))
            except ModelError as error:
                self._tokenizer, self._template = None, _TEMPLATE_ESTIMATE
                self._note(f"lengths of prompts are estimated: {error}")
        within = (
            estimated_tokens(text) if self._tokenizer is None else _count(self._tokenizer, text)
        )
        return self._template + within


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, for tokenizers that take digits one by one.

    Of needles' haystacks it is 0 to 30 % above what SmolLM2's tokenizer makes: a prompt should rather
    be too short than not fit.
    """
    tokens = 0
    for match in _PIECES.finditer(text):
        piece = match[0]
        if not piece.isalpha():
            tokens += 1 + (len(piece) - 1) // 8  # a row of one sign is few tokens
        elif match.start() == 0 or text[match.start() - 1].isspace():
            tokens += 1 + len(piece) // 9
        else:  # parts of UUIDs and of words with a hyphen are cut small
            tokens += 1 + len(piece) // 5
    return math.ceil(1.07 * tokens)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
