r"""MATH-500, AIME 2024 and 2025, and GSM8K: a problem, and an answer in ``\boxed{}``.

The prompts are evalscope's (1.14), without its examples: models that think do worse with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import AliasChoices, Field, field_validator

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, Verdict
from mixquant.evaluate.tasks.equivalence import concludes, equivalent
from mixquant.evaluate.tasks.extraction import last_boxed, strip_thinking
from mixquant.evaluate.tasks.isolation import IsolationError, isolated
from mixquant.evaluate.tasks.records import DataRecord, read_records, records_from_hub, unique

_STEPS = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_AIME = (
    "\nSolve the following math problem step by step. Put your answer inside \\boxed{{}}.\n\n"
    "{problem}\n\nRemember to put your answer inside \\boxed{{}}."
)


class _Problem(DataRecord):
    id: str | None = Field(None, validation_alias=AliasChoices("unique_id", "id", "ID"))
    problem: str = Field(min_length=1, validation_alias=AliasChoices("problem", "Problem"))
    answer: str = Field(min_length=1, validation_alias=AliasChoices("answer", "Answer"))
    level: str = ""


class _AimeProblem(_Problem):
    # math-ai/aime24 has only a solution: the answer in a box.
    answer: str = Field(validation_alias=AliasChoices("answer", "Answer", "solution"))

    @field_validator("answer")
    @classmethod
    def _is_integer(cls, value: str) -> str:
        value = (last_boxed(value) or value).strip()
        if not re.fullmatch(r"[0-9]{1,3}", value):
            raise ValueError(f"expected an integer from 0 to 999, found {value[:40]!r}")
        return str(int(value))


class _GradeSchoolProblem(_Problem):
    problem: str = Field(min_length=1, validation_alias="question")

    @field_validator("answer")
    @classmethod
    def _ends_with_number(cls, value: str) -> str:
        number = value.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
        if "####" not in value or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
            raise ValueError("expected a solution that ends with #### and a number")
        return number


class _Mathematics(Task):
    """Scored by Math-Verify on the last box; an answer without a box by what its prose ends with."""

    repository: ClassVar[str]
    split: ClassVar[str] = "test"
    subset: ClassVar[str] = ""
    schema: ClassVar[type[_Problem]] = _Problem
    prompt: ClassVar[str] = _STEPS

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            records = records_from_hub(self.repository, self.split, self.schema, self.subset)
        else:
            records = read_records(data, self.schema)
        items = [
            Item(
                id=record.id or str(number),
                messages=({"role": "user", "content": self.prompt.format(problem=record.problem)},),
                reference=record.answer,
                group=f"level {record.level}" if record.level else "",
            )
            for number, record in enumerate(records, 1)
        ]
        unique([item.id for item in items], data)
        return items

    def scored(self, answer: Answer) -> str:
        """The text in which the answer is looked for."""
        return strip_thinking(str(answer.get("text") or ""))

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        text = self.scored(answer)
        boxed = last_boxed(text)
        try:
            if boxed is not None:
                right = await isolated(equivalent, item.reference, boxed)
            else:
                right = await isolated(concludes, item.reference, text)
        except IsolationError as error:
            return Verdict(0.0, f"the answer could not be compared: {error}")
        found = f"answered {boxed[:100]!r}" if boxed is not None else "no box"
        return Verdict(
            float(bool(right)),
            f"{found}, expected {item.reference!r}",
            extracted=bool(boxed) if boxed is not None else right is not None,
        )


class Math500(_Mathematics):
    """500 problems of MATH: ``HuggingFaceH4/MATH-500``, split ``test``."""

    name = "math500"
    repository = "HuggingFaceH4/MATH-500"


class Aime24(_Mathematics):
    """The 30 problems of AIME 2024: ``HuggingFaceH4/aime_2024``, split ``train``."""

    name = "aime24"
    repository = "HuggingFaceH4/aime_2024"
    split = "train"
    schema = _AimeProblem
    prompt = _AIME
    defaults: ClassVar[Mapping[str, Any]] = {"seeds": 3}


class Aime25(_Mathematics):
    """The 30 problems of AIME 2025: ``math-ai/aime25``, split ``test``."""

    name = "aime25"
    repository = "math-ai/aime25"
    schema = _AimeProblem
    prompt = _AIME
    defaults: ClassVar[Mapping[str, Any]] = {"seeds": 3}


class Gsm8k(_Mathematics):
    """1,319 grade-school problems: ``openai/gsm8k``, subset ``main``, split ``test``."""

    name = "gsm8k"
    repository = "openai/gsm8k"
    subset = "main"
    schema = _GradeSchoolProblem
