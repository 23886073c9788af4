"""AA-LCR of Artificial Analysis: questions across sets of some 100,000 tokens of documents."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, TaskError, Verdict
from mixquant.evaluate.tasks.extraction import strip_thinking
from mixquant.evaluate.tasks.judging import judged
from mixquant.evaluate.tasks.records import DataRecord, file_from_hub, read_records, unique

_REPOSITORY = "ArtificialAnalysis/AA-LCR"
_QUESTIONS = "AA-LCR_Dataset.csv"
_DOCUMENTS = "AA-LCR_extracted-text.zip"

# The data set's README, version 1.0.
_PROMPT = """\
BEGIN INPUT DOCUMENTS

{documents}

END INPUT DOCUMENTS

Answer the following question using the input documents provided above.

START QUESTION

{question}

END QUESTION
"""
_JUDGE = """\
Assess whether the following CANDIDATE ANSWER is CORRECT or INCORRECT.
For the CANDIDATE ANSWER to be correct, it must be consistent with the OFFICIAL ANSWER.

The question, for reference only: {question}
The OFFICIAL ANSWER: {official}
CANDIDATE ANSWER TO ASSESS: {candidate}

Reply only with CORRECT or INCORRECT."""


class _Question(DataRecord):
    question_id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    document_category: str = Field(min_length=1)
    document_set_id: str = Field(min_length=1)
    data_source_filenames: str = Field(min_length=1)  # in order, separated by semicolons


class AaLcr(Task):
    """100 questions: ``ArtificialAnalysis/AA-LCR``, ``AA-LCR_Dataset.csv`` and the documents' ZIP.

    ``--data`` names the CSV; beside it, or below ``extracted_text`` beside it, lies the ZIP as
    published. The data set was made to fit 128,000 tokens: what is cut is what a model has no room for.
    """

    name = "aa-lcr"
    needs_judge = True
    defaults: ClassVar[Mapping[str, Any]] = {"context_tokens": 131_072, "seeds": 3}

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            archive = file_from_hub(_REPOSITORY, f"extracted_text/{_DOCUMENTS}")
            data = file_from_hub(_REPOSITORY, _QUESTIONS)
        else:
            archive = _archive_of(data)
        records = read_records(data, _Question)
        unique([record.question_id for record in records], data)
        documents = _documents(archive)
        return [
            Item(
                id=record.question_id,
                messages=(
                    {
                        "role": "user",
                        "content": _PROMPT.format(
                            documents=cut(_joined(record, documents, data, archive)),
                            question=record.question,
                        ),
                    },
                ),
                reference={"question": record.question, "answer": record.answer},
                group=record.document_category,
            )
            for record in records
        ]

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        text = strip_thinking(str(answer.get("text") or ""))
        if not text:
            return Verdict(0.0, "no answer beside thinking", extracted=False)
        prompt = _JUDGE.format(
            question=item.reference["question"], official=item.reference["answer"], candidate=text
        )
        return await judged(judge, prompt, {"correct": 1.0, "incorrect": 0.0}, max_tokens=4096)


def _archive_of(data: Path) -> Path:
    for archive in (data.parent / _DOCUMENTS, data.parent / "extracted_text" / _DOCUMENTS):
        if archive.is_file():
            return archive
    raise TaskError(
        f"{data}: its documents are missing: expected {_DOCUMENTS} beside it or below extracted_text/"
    )


def _documents(archive: Path) -> dict[str, str]:
    """Texts by ``category/set/file``."""
    texts = {}
    try:
        with zipfile.ZipFile(archive) as files:
            for entry in files.infolist():
                if entry.is_dir():
                    continue
                name = entry.filename.removeprefix("lcr/")
                text = files.read(entry).decode("utf-8", "replace").strip()
                texts[name] = text
                # Some published names are UTF-8 that was taken for the ZIP's old code page.
                with contextlib.suppress(UnicodeError):
                    texts[name.encode("cp437").decode("utf-8")] = text
    except (OSError, zipfile.BadZipFile) as error:
        raise TaskError(f"cannot read {archive}: {error}") from None
    return texts


def _joined(record: _Question, documents: Mapping[str, str], data: Path, archive: Path) -> str:
    parts = []
    for number, file in enumerate(record.data_source_filenames.split(";"), 1):
        name = f"{record.document_category}/{record.document_set_id}/{file.strip()}"
        if name not in documents:
            raise TaskError(
                f"{data}: question {record.question_id}: field 'data_source_filenames': "
                f"{archive.name} has no lcr/{name}"
            )
        parts.append(f"BEGIN DOCUMENT {number}:\n{documents[name]}\nEND DOCUMENT {number}")
    return "\n\n".join(parts)
