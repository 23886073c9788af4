r"""What the scripts of Mix-Quant's authors (arXiv 2605.20315) ask and score otherwise than we do.

docs/reference/benchmarks.md has the differences in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mixquant.evaluate.tasks import Answer, mathematics
from mixquant.evaluate.tasks.extraction import last_boxed, strip_thinking

_SEED = 42
_BOXED = "Put your final answer within \\boxed{{}}.\n{problem}"


class _Boxed:
    """One sentence before the problem, one seed, and a box that may stand in a thought."""

    prompt: ClassVar[str] = _BOXED
    defaults: ClassVar[Mapping[str, Any]] = {"seeds": 1, "first_seed": _SEED}

    def scored(self, answer: Answer) -> str:
        text = strip_thinking(str(answer.get("text") or ""))
        if last_boxed(text) is None:
            text = f"{answer.get('reasoning') or ''}\n{answer.get('text') or ''}"
        return text


class Math500(_Boxed, mathematics.Math500):
    """As `mathematics.Math500`."""


class Aime24(_Boxed, mathematics.Aime24):
    """As `mathematics.Aime24`."""


class Aime25(_Boxed, mathematics.Aime25):
    """As `mathematics.Aime25`."""


class Gsm8k(_Boxed, mathematics.Gsm8k):
    """As `mathematics.Gsm8k`."""
