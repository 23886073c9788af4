"""LongBench v2 (arXiv 2412.15204): multiple choice over long documents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, Verdict
from mixquant.evaluate.tasks.extraction import chosen_letter, strip_thinking
from mixquant.evaluate.tasks.records import Record, read_records, records_from_hub, unique

# The authors' prompts/0shot.txt.
_PROMPT = """\
Please read the following text and answer the question below.

<text>
$DOC$
</text>

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""


class _Question(Record):
    id: str = Field(min_length=1, validation_alias="_id")
    length: Literal["short", "medium", "long"]
    difficulty: Literal["easy", "hard", ""] = ""
    question: str = Field(min_length=1)
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str = Field(min_length=1)


class LongBenchV2(Task):
    """503 questions: ``zai-org/LongBench-v2``, split ``train``.

    The authors cut the whole prompt in its middle; here the document is cut, so that neither the
    question nor the choices can be lost.
    """

    name = "longbench-v2"
    defaults: ClassVar[Mapping[str, Any]] = {"context_tokens": 120_000}
    order = ("easy", "hard", "short", "medium", "long")

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            records = records_from_hub("zai-org/LongBench-v2", "train", _Question)
        else:
            records = read_records(data, _Question)
        unique([record.id for record in records], data)
        return [
            Item(
                id=record.id,
                messages=(
                    {"role": "user", "content": _prompt(record, cut(record.context.strip()))},
                ),
                reference=record.answer,
                group=record.length,
                also=(record.difficulty,) if record.difficulty else (),
            )
            for record in records
        ]

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        letter = chosen_letter(strip_thinking(str(answer.get("text") or "")))
        found = f"chose {letter}" if letter else "chose no letter"
        return Verdict(
            float(letter == item.reference),
            f"{found}, expected {item.reference}",
            extracted=letter is not None,
        )


def _prompt(record: _Question, document: str) -> str:
    parts = {
        "DOC": document,
        "Q": record.question.strip(),
        "C_A": record.choice_A.strip(),
        "C_B": record.choice_B.strip(),
        "C_C": record.choice_C.strip(),
        "C_D": record.choice_D.strip(),
    }
    # In one go: a document may hold "$Q$" itself.
    return re.sub(r"\$(DOC|Q|C_[ABCD])\$", lambda match: parts[match[1]], _PROMPT)
