"""LongBench v2 (arXiv 2412.15204): multiple choice over long documents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, TaskError, Verdict
from mixquant.evaluate.tasks.extraction import chosen_letter, strip_thinking
from mixquant.evaluate.tasks.records import DataRecord, read_records, records_from_hub, unique

# The authors' prompts: 0shot.txt, 0shot_rag.txt, 0shot_no_context.txt.
_QUESTION = """\
What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

"""
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_TEXT = "\n\n<text>\n$DOC$\n</text>\n\n"
_READ = "Please read the following text and answer the question below."
_CHUNKS = "Please read the following retrieved text chunks and answer the question below."
# With chains of thought. The authors' template then says "Let's think step by step:" and asks for the
# letter in a second request; Mix-Quant's authors let the model answer at once, in this format.
_READ_COT = "Please read the following text and answer the questions below."
_MOST_LIKELY = "What is the single, most likely answer choice? "


class _Chunk(DataRecord):
    c_idx: int  # place in the document
    content: str


class LongBenchQuestion(DataRecord):
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
    retrieved_context: list[_Chunk] | None = None  # best first; not in the published file


class LongBenchV2(Task):
    """503 questions: ``zai-org/LongBench-v2``, split ``train``.

    The authors cut the whole prompt in its middle; here the document is cut, so that neither the
    question nor the choices can be lost.

    Args:
        cot: whether the prompt is the one for chains of thought. None: as the protocol has it.
        no_context: asks without the document.
        retrieved: how many of a record's ``retrieved_context`` stand in place of the document; 0: none.
    """

    name = "longbench-v2"
    defaults: ClassVar[Mapping[str, Any]] = {"context_tokens": 120_000}
    order = ("easy", "hard", "short", "medium", "long")
    options = frozenset({"cot", "no_context", "retrieved"})
    usually_cot: ClassVar[bool] = False

    def __init__(
        self, cot: bool | None = None, no_context: bool = False, retrieved: int = 0
    ) -> None:
        if no_context and retrieved:
            raise TaskError("--no-context and --retrieved exclude each other: give one")
        self.cot = self.usually_cot if cot is None else cot
        self._no_context = no_context
        self._retrieved = retrieved

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            records = records_from_hub("zai-org/LongBench-v2", "train", LongBenchQuestion)
        else:
            records = read_records(data, LongBenchQuestion)
        unique([record.id for record in records], data)
        return [
            Item(
                id=record.id,
                messages=({"role": "user", "content": self._prompt(record, cut)},),
                reference=record.answer,
                group=record.length,
                also=(record.difficulty,) if record.difficulty else (),
            )
            for record in records
        ]

    def _prompt(self, record: LongBenchQuestion, cut: Cut) -> str:
        if self._no_context:
            return self.filled(_QUESTION + _MOST_LIKELY + _FORMAT, record, "", cut)
        if self._retrieved:
            document = self._chunks(record)
            return self.filled(_CHUNKS + _TEXT + _QUESTION + _FORMAT, record, document, cut)
        read = _READ_COT if self.cot else _READ
        return self.filled(read + _TEXT + _QUESTION + _FORMAT, record, record.context, cut)

    def _chunks(self, record: LongBenchQuestion) -> str:
        if not record.retrieved_context:
            raise TaskError(
                f"question {record.id}: field 'retrieved_context': --retrieved needs the pieces in the "
                'data: [{"c_idx": place, "content": text}, ...], the best first; give them with --data'
            )
        best = record.retrieved_context[: self._retrieved]
        return "\n\n".join(
            f"Retrieved chunk {number}: {chunk.content}"
            for number, chunk in enumerate(sorted(best, key=lambda chunk: chunk.c_idx), 1)
        )

    def filled(self, template: str, record: LongBenchQuestion, document: str, cut: Cut) -> str:
        """The prompt; the document is cut."""
        return in_place(template, record, cut(document.strip()) if document else "")

    def letter(self, answer: Answer) -> str | None:
        """What an answer settles on, A to D."""
        return chosen_letter(strip_thinking(str(answer.get("text") or "")))

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        letter = self.letter(answer)
        found = f"chose {letter}" if letter else "chose no letter"
        return Verdict(
            float(letter == item.reference),
            f"{found}, expected {item.reference}",
            extracted=letter is not None,
        )


def in_place(template: str, record: LongBenchQuestion, document: str) -> str:
    """A template with everything in its place."""
    parts = {
        "DOC": document,
        "Q": record.question.strip(),
        "C_A": record.choice_A.strip(),
        "C_B": record.choice_B.strip(),
        "C_C": record.choice_C.strip(),
        "C_D": record.choice_D.strip(),
    }
    # In one go: a document may hold "$Q$" itself.
    return re.sub(r"\$(DOC|Q|C_[ABCD])\$", lambda match: parts[match[1]], template)
