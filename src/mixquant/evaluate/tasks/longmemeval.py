"""LongMemEval-S (arXiv 2410.10813): questions about some 115,000 tokens of earlier chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, Verdict
from mixquant.evaluate.tasks.extraction import strip_thinking
from mixquant.evaluate.tasks.judging import judged
from mixquant.evaluate.tasks.records import DataRecord, file_from_hub, read_records, unique

# The authors' src/generation/run_generation.py, whole history, sessions as JSON, answer in steps.
_PROMPT = (
    "I will give you several history chats between you and a user. Please answer the question based "
    "on the relevant chat history. Answer the question step by step: first extract all the relevant "
    "information, and then reason over the information to get the answer.\n\n\nHistory Chats:\n\n"
    "{history}\n\nCurrent Date: {date}\nQuestion: {question}\nAnswer (step by step):"
)

# The authors' src/evaluation/evaluate_qa.py.
_CORRECT = (
    "I will give you a question, a correct answer, and a response from a model. Please answer yes if "
    "the response contains the correct answer. Otherwise, answer no. "
)
_EQUIVALENT = (
    "If the response is equivalent to the correct answer or contains all the intermediate steps to "
    "get the correct answer, you should also answer yes. If the response only contains a subset of "
    "the information required by the answer, answer no. "
)
_OFF_BY_ONE = (
    "In addition, do not penalize off-by-one errors for the number of days. If the question asks for "
    "the number of days/weeks/months, etc., and the model makes off-by-one errors (e.g., predicting "
    "19 days when the answer is 18), the model's response is still correct. "
)
_UPDATED = (
    "If the response contains some previous information along with an updated answer, the response "
    "should be considered as correct as long as the updated answer is the required answer."
)
_PERSONAL = (
    "I will give you a question, a rubric for desired personalized response, and a response from a "
    "model. Please answer yes if the response satisfies the desired response. Otherwise, answer no. "
    "The model does not need to reflect all the points in the rubric. The response is correct as long "
    "as it recalls and utilizes the user's personal information correctly."
)
_UNANSWERABLE = (
    "I will give you an unanswerable question, an explanation, and a response from a model. Please "
    "answer yes if the model correctly identifies the question as unanswerable. The model could say "
    "that the information is incomplete, or some other information is given but the asked information "
    "is not."
)
_JUDGE = "{task}\n\nQuestion: {question}\n\n{what}: {answer}\n\nModel Response: {response}\n\n{ask}"
_IS_CORRECT = "Is the model response correct? Answer yes or no only."
_IS_UNANSWERABLE = (
    "Does the model correctly identify the question as unanswerable? Answer yes or no only."
)
_TASKS = {
    "single-session-user": _CORRECT + _EQUIVALENT,
    "single-session-assistant": _CORRECT + _EQUIVALENT,
    "multi-session": _CORRECT + _EQUIVALENT,
    "temporal-reasoning": _CORRECT + _EQUIVALENT + _OFF_BY_ONE,
    "knowledge-update": _CORRECT + _UPDATED,
    "single-session-preference": _PERSONAL,
}


class Turn(DataRecord):
    role: Literal["user", "assistant"]
    content: str


class LongMemEvalQuestion(DataRecord):
    question_id: str = Field(min_length=1)
    question_type: Literal[
        "single-session-user",
        "single-session-assistant",
        "single-session-preference",
        "multi-session",
        "temporal-reasoning",
        "knowledge-update",
    ]
    question: str = Field(min_length=1)
    answer: str
    question_date: str
    haystack_dates: list[str]
    haystack_sessions: list[list[Turn]]

    @model_validator(mode="after")
    def _dated(self) -> LongMemEvalQuestion:
        if len(self.haystack_dates) != len(self.haystack_sessions):
            raise ValueError(
                f"{len(self.haystack_sessions)} haystack_sessions, "
                f"but {len(self.haystack_dates)} haystack_dates"
            )
        return self


class LongMemEval(Task):
    """500 questions: ``xiaowu0162/longmemeval-cleaned``, file ``longmemeval_s_cleaned.json``."""

    name = "longmemeval"
    needs_judge = True
    defaults: ClassVar[Mapping[str, Any]] = {"context_tokens": 112_000}

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if data is None:
            data = file_from_hub("xiaowu0162/longmemeval-cleaned", "longmemeval_s_cleaned.json")
        records = read_records(data, LongMemEvalQuestion)
        unique([record.question_id for record in records], data)
        return [
            Item(
                id=record.question_id,
                messages=({"role": "user", "content": self.prompt(record, cut)},),
                reference={
                    "type": record.question_type,
                    "question": record.question,
                    "answer": record.answer,
                },
                group=record.question_type,
            )
            for record in records
        ]

    def prompt(self, record: LongMemEvalQuestion, cut: Cut) -> str:
        """The prompt of a question; the history is cut."""
        return _PROMPT.format(
            history=cut(history(record, _as_json)),
            date=record.question_date,
            question=record.question,
        )

    async def verdict(self, prompt: str, judge: Chat | None) -> Verdict:
        """What the judge says to a prompt."""
        return await judged(judge, prompt, {"yes": 1.0, "no": 0.0}, max_tokens=4096)

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        text = strip_thinking(str(answer.get("text") or ""))
        if not text:
            return Verdict(0.0, "no answer beside thinking", extracted=False)
        prompt = _judge_prompt(item.id, item.reference, text)
        return await self.verdict(prompt, judge)


def history(record: LongMemEvalQuestion, write: Callable[[Sequence[Turn]], str]) -> str:
    """All sessions by date.

    Args:
        write: the text of one session.
    """
    sessions = sorted(
        zip(record.haystack_dates, record.haystack_sessions, strict=True), key=lambda pair: pair[0]
    )
    return "".join(
        f"\n### Session {number}:\nSession Date: {date}\nSession Content:\n{write(turns)}\n"
        for number, (date, turns) in enumerate(sessions, 1)
    )


def _as_json(turns: Sequence[Turn]) -> str:
    return "\n" + json.dumps([turn.model_dump() for turn in turns], ensure_ascii=False)


def _judge_prompt(id: str, reference: dict[str, Any], response: str) -> str:
    kind = reference["type"]
    # Abstention questions, to which the history holds no answer, are told by their ids.
    unanswerable = "_abs" in id
    if unanswerable:
        what = "Explanation"
    else:
        what = "Rubric" if kind == "single-session-preference" else "Correct Answer"
    return _JUDGE.format(
        task=_UNANSWERABLE if unanswerable else _TASKS[kind],
        question=reference["question"],
        what=what,
        answer=reference["answer"],
        response=response,
        ask=_IS_UNANSWERABLE if unanswerable else _IS_CORRECT,
    )
