r"""What the scripts of Mix-Quant's authors (arXiv 2605.20315) ask and score otherwise than we do.

docs/reference/benchmarks.md has the differences in a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mixquant.evaluate.tasks import (
    Answer,
    Chat,
    Cut,
    Verdict,
    gpqa,
    longbench,
    longmemeval,
    mathematics,
)
from mixquant.evaluate.tasks.extraction import last_boxed, strip_thinking
from mixquant.evaluate.tasks.judging import says_yes

_SEED = 42
_ANNOUNCED = re.compile(
    r"(?:the correct answer is|final answer ?[:：]?|\banswer ?[:：]|\boption ?[:：]?) ?\(? ?([A-D])",
    re.IGNORECASE,
)
_CORRECT = (
    re.compile(r"The correct answer is \(([A-D])\)"),
    re.compile(r"The correct answer is ([A-D])"),
)
_BOXED = "Put your final answer within \\boxed{{}}.\n{problem}"
_DIRECT = (
    "I will give you several history chats between you and a user. Please answer the question based "
    "on the relevant chat history.\n\n\nHistory Chats:\n\n{history}\n\nCurrent Date: {date}\n"
    "Question: {question}\nAnswer:"
)


class _Boxed:
    """One sentence before the problem, one seed, and a box that may stand in a thought."""

    prompt: ClassVar[str] = _BOXED
    defaults: ClassVar[Mapping[str, Any]] = {"seeds": 1, "first_seed": _SEED}

    def scored(self, answer: Answer) -> str:
        text = strip_thinking(str(answer.get("text") or ""))
        if last_boxed(text) is None:
            text = f"{answer.get('reasoning') or ''}\n{answer.get('text') or ''}"
        return text


class LongBenchV2(longbench.LongBenchV2):
    """The whole prompt is cut. The letter is the last one that is announced."""

    usually_cot = True
    cuts_prompts = True

    def defaults_for(self, model: str) -> Mapping[str, Any]:
        short = re.search(r"\bqwen3-8b\b", model, re.IGNORECASE)
        return {
            "seeds": 1,
            "first_seed": _SEED,
            "max_tokens": 30_720,
            "context_tokens": 100_000 if short else 120_000,
            "special_tokens": True,
        }

    def filled(
        self, template: str, record: longbench.LongBenchQuestion, document: str, cut: Cut
    ) -> str:
        return cut(longbench.in_place(template, record, document.strip()))

    def letter(self, answer: Answer) -> str | None:
        text = str(answer.get("text") or "")
        whole = f"{answer.get('reasoning') or ''}\n{text}"
        if not self.cot:
            said = whole.replace("*", "")
            found = next(filter(None, (pattern.search(said) for pattern in _CORRECT)), None)
            return found[1] if found else None
        for said in (strip_thinking(text), whole):
            # One space each: the pattern would take long for many.
            letters = _ANNOUNCED.findall(" ".join(said.replace("*", " ").split()))
            if letters:
                return str(letters[-1]).upper()
        return None


class LongMemEval(longmemeval.LongMemEval):
    """Sessions as text, a direct answer, the whole prompt cut, one short reply of the judge."""

    cuts_prompts = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "seeds": 1,
        "first_seed": _SEED,
        "max_tokens": 19_072,
        "context_tokens": 112_000,
        "special_tokens": True,
    }

    def prompt(self, record: longmemeval.LongMemEvalQuestion, cut: Cut) -> str:
        return cut(
            _DIRECT.format(
                history=longmemeval.history(record, _as_text),
                date=record.question_date,
                question=record.question,
            )
        )

    async def verdict(self, prompt: str, judge: Chat | None) -> Verdict:
        return await says_yes(judge, prompt)


def _as_text(turns: Sequence[longmemeval.Turn]) -> str:
    return "".join(f"\n\n{turn.role}: {turn.content.strip()}" for turn in turns)


class GpqaDiamond(gpqa.GpqaDiamond):
    """The sentence and the seed of mathematics."""

    prompt = _BOXED
    defaults: ClassVar[Mapping[str, Any]] = _Boxed.defaults


class Math500(_Boxed, mathematics.Math500):
    """As `mathematics.Math500`."""


class Aime24(_Boxed, mathematics.Aime24):
    """As `mathematics.Aime24`."""


class Aime25(_Boxed, mathematics.Aime25):
    """As `mathematics.Aime25`."""


class Gsm8k(_Boxed, mathematics.Gsm8k):
    """As `mathematics.Gsm8k`."""
