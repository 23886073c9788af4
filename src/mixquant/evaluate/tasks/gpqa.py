"""GPQA-Diamond (arXiv 2311.12022): multiple choice that experts of other fields cannot look up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, Verdict
from mixquant.evaluate.tasks.extraction import chosen_letter, strip_thinking
from mixquant.evaluate.tasks.records import DataRecord, read_records, records_from_hub, unique

# As in OpenAI's simple-evals.
_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the "
    "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by "
    "step before answering.\n\n{problem}"
)


class _Question(DataRecord):
    id: str = Field(min_length=1, validation_alias="Record ID")
    question: str = Field(min_length=1, validation_alias="Question")
    right: str = Field(min_length=1, validation_alias="Correct Answer")
    wrong_1: str = Field(min_length=1, validation_alias="Incorrect Answer 1")
    wrong_2: str = Field(min_length=1, validation_alias="Incorrect Answer 2")
    wrong_3: str = Field(min_length=1, validation_alias="Incorrect Answer 3")
    domain: str = Field("", validation_alias="High-level domain")


class GpqaDiamond(Task):
    """198 questions: ``Idavidrein/gpqa``, subset ``gpqa_diamond``, split ``train``.

    The data set has the right answer first. Here each question's answers have a random order, always
    the same.
    """

    name = "gpqa-diamond"
    prompt: ClassVar[str] = _PROMPT

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            records = records_from_hub("Idavidrein/gpqa", "train", _Question, "gpqa_diamond")
        else:
            records = read_records(data, _Question)
        unique([record.id for record in records], data)
        return [self._item(record) for record in records]

    def _item(self, record: _Question) -> Item:
        answers = [record.right, record.wrong_1, record.wrong_2, record.wrong_3]
        order = random.Random(record.id).sample(range(4), 4)
        choices = "\n".join(
            f"{letter}) {answers[place].strip()}"
            for letter, place in zip("ABCD", order, strict=True)
        )
        problem = f"{record.question.strip()}\n\n{choices}"
        return Item(
            id=record.id,
            messages=({"role": "user", "content": self.prompt.format(problem=problem)},),
            reference="ABCD"[order.index(0)],
            group=record.domain,
        )

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        letter = chosen_letter(strip_thinking(str(answer.get("text") or "")))
        found = f"chose {letter}" if letter else "chose no letter"
        return Verdict(
            float(letter == item.reference),
            f"{found}, expected {item.reference}",
            extracted=letter is not None,
        )
