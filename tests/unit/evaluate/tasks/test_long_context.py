"""Long documents and long histories: LongBench v2, LongMemEval, AA-LCR, and their judges."""

from __future__ import annotations

import asyncio
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.evaluate.tasks import Item, JudgeError, Reply, TaskError, Verdict
from mixquant.evaluate.tasks.judging import judged
from mixquant.evaluate.tasks.registry import task


class Judge:
    """Says what it is told to, and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []

    async def ask(self, messages: Sequence[dict[str, Any]], **options: Any) -> Reply:
        self.asked.append(messages[0]["content"])
        self.options.append(options)
        return Reply(self.replies[min(len(self.asked), len(self.replies)) - 1])


def load(name: str, path: Path, cut: Any = lambda text: text) -> list[Item]:
    return task(name).load(path, cut)


def score(name: str, item: Item, text: str, judge: Judge | None = None) -> Verdict:
    return asyncio.run(task(name).score(item, {"text": text}, judge))  # type: ignore[arg-type]


LONGBENCH = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "sub_domain": "Financial",
    "difficulty": "easy",
    "length": "short",
    "question": "What does $Q$ stand for?",
    "choice_A": "Quarter",
    "choice_B": "Question",
    "choice_C": "Queue",
    "choice_D": "$DOC$",
    "answer": "B",
    "context": "A document of $C_A$ and {braces}.",
}


def test_longbench_as_published(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([LONGBENCH]))
    (item,) = load("longbench-v2", path)
    assert (item.id, item.group, item.reference) == (LONGBENCH["_id"], "short", "B")
    assert item.also == ("easy",)
    assert item.messages[0]["content"] == (
        "Please read the following text and answer the question below.\n\n"
        "<text>\nA document of $C_A$ and {braces}.\n</text>\n\n"
        "What is the correct answer to this question: What does $Q$ stand for?\n"
        "Choices:\n(A) Quarter\n(B) Question\n(C) Queue\n(D) $DOC$\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert score("longbench-v2", item, "<think>(A)?</think>The correct answer is (B).").score == 1
    assert score("longbench-v2", item, "The correct answer is (A).").score == 0
    assert score("longbench-v2", item, "I cannot say.").score == 0


def test_longbench_has_scores_by_difficulty_and_by_length(tmp_path: Path) -> None:
    from mixquant.evaluate.benchmarks.answer_file import AnswerFile
    from mixquant.evaluate.benchmarks.scoring import Answered, scores_of

    path = tmp_path / "data.json"
    kinds = [("hard", "long"), ("easy", "short"), ("hard", "medium")]
    path.write_text(
        json.dumps(
            [
                {**LONGBENCH, "_id": str(number), "difficulty": difficulty, "length": length}
                for number, (difficulty, length) in enumerate(kinds)
            ]
        )
    )
    items = load("longbench-v2", path)
    answered = Answered(
        task("longbench-v2"), items, 1, {"a": AnswerFile(tmp_path / "none.jsonl", {})}, None
    )
    _, parts = scores_of(answered, "a")
    found = [(part.benchmark.removeprefix("longbench-v2/"), part.items) for part in parts]
    assert found == [("easy", 1), ("hard", 2), ("short", 1), ("medium", 1), ("long", 1)]


def test_only_the_document_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**LONGBENCH, "context": "long " * 100}]))
    (item,) = load("longbench-v2", path, cut=lambda text: "CUT")
    content = item.messages[0]["content"]
    assert "<text>\nCUT\n</text>" in content
    assert "(D) $DOC$" in content
    assert task("longbench-v2").defaults["context_tokens"] == 120_000


MEMORY = {
    "question_id": "e47becba",
    "question_type": "single-session-user",
    "question": "What degree did I graduate with?",
    "answer": "Business Administration",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/25 (Thu) 01:00", "2023/05/20 (Sat) 02:21"],
    "haystack_session_ids": ["b", "a"],
    "haystack_sessions": [
        [
            {"role": "user", "content": "Später", "has_answer": True},
            {"role": "assistant", "content": "yes"},
        ],
        [{"role": "user", "content": "I graduated."}],
    ],
    "answer_session_ids": ["b"],
}


def memory(tmp_path: Path, **changes: Any) -> Item:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps([{**MEMORY, **changes}]))
    (item,) = load("longmemeval", path)
    return item


def test_longmemeval_as_published(tmp_path: Path) -> None:
    item = memory(tmp_path)
    content = item.messages[0]["content"]
    assert content.endswith(
        "Current Date: 2023/05/30 (Tue) 23:40\n"
        "Question: What degree did I graduate with?\nAnswer (step by step):"
    )
    first = (
        "### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n\n"
        '[{"role": "user", "content": "I graduated."}]\n'
    )
    assert first in content
    assert "### Session 2:\nSession Date: 2023/05/25 (Thu) 01:00" in content
    assert "Später" in content
    assert "has_answer" not in content
    assert task("longmemeval").defaults["context_tokens"] == 112_000


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        (
            {},
            "\n\nCorrect Answer: Business Administration\n\nModel Response: So: BA.\n\nIs the model",
        ),
        ({"question_type": "multi-session"}, "only contains a subset of the information"),
        ({"question_type": "temporal-reasoning"}, "do not penalize off-by-one errors"),
        (
            {"question_type": "knowledge-update"},
            "previous information along with an updated answer",
        ),
        ({"question_type": "single-session-preference"}, "\n\nRubric: Business Administration\n\n"),
        (
            {"question_id": "x_abs"},
            "Does the model correctly identify the question as unanswerable?",
        ),
    ],
)
def test_each_type_of_question_is_judged_as_published(
    tmp_path: Path, changes: dict[str, Any], asked: str
) -> None:
    judge = Judge("Yes.")
    item = memory(tmp_path, **changes)
    assert score("longmemeval", item, "<think>hm</think>So: BA.", judge).score == 1
    assert asked in judge.asked[0]
    assert judge.asked[0].endswith("Answer yes or no only.")
    assert "hm" not in judge.asked[0].partition("Model Response")[2].partition("\n\n")[0]
    assert judge.options[0]["temperature"] == 0
    assert score("longmemeval", item, "Law", Judge("no")).score == 0


def test_thinking_alone_is_no_answer(tmp_path: Path) -> None:
    judge = Judge("yes")
    assert score("longmemeval", memory(tmp_path), "<think>BA", judge).score == 0
    assert judge.asked == []


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        ("yes", 1),
        ("Yes.", 1),
        ("**No**", 0),
        ("<think>is it no?</think>\n\nyes", 1),
        ("No, the response does not say yes to it.", 0),
        ("The response is right, so: yes", 1),
        ("I would say yes here", 1),
    ],
)
def test_what_judges_say(said: str, worth: float) -> None:
    words = {"yes": 1.0, "no": 0.0}
    verdict = asyncio.run(judged(Judge(said), "?", words, max_tokens=9))  # type: ignore[arg-type]
    assert verdict.score == worth


def test_incorrect_is_not_taken_for_correct() -> None:
    words = {"correct": 1.0, "incorrect": 0.0}
    for said, worth in (("INCORRECT", 0), ("CORRECT", 1), ("The answer is **INCORRECT**.", 0)):
        verdict = asyncio.run(judged(Judge(said), "?", words, max_tokens=9))  # type: ignore[arg-type]
        assert verdict.score == worth


def test_no_verdict_is_asked_again_and_then_an_error_not_a_zero(tmp_path: Path) -> None:
    item = memory(tmp_path)
    judge = Judge("maybe", "it depends, yes and no in parts", "yes")
    assert score("longmemeval", item, "BA", judge).score == 1
    assert len(judge.asked) == 3
    assert judge.options[0]["temperature"] != judge.options[1]["temperature"]
    with pytest.raises(JudgeError, match="'maybe', expected yes or no"):
        score("longmemeval", item, "BA", Judge("maybe"))
    with pytest.raises(JudgeError, match="no judge"):
        score("longmemeval", item, "BA", None)


@given(st.text())
def test_whatever_a_judge_says_it_is_a_verdict_or_an_error(said: str) -> None:
    try:
        verdict = asyncio.run(
            judged(Judge(said), "?", {"yes": 1.0, "no": 0.0}, max_tokens=9)  # type: ignore[arg-type]
        )
    except JudgeError as error:
        assert "\n" not in str(error)
    else:
        assert verdict.score in (0, 1)


LCR = (
    ",document_category,document_set_id,question_id,question,answer,data_source_filenames,"
    "data_source_urls,input_tokens\n"
    '0,Company_Documents,co_dc,1,"Which, of both?","Equinix, 5%",b.txt;the EU’s a.txt,u;u,42\n'
)


def lcr(tmp_path: Path, table: str = LCR, folder: str = "extracted_text") -> Path:
    (tmp_path / folder).mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / folder / "AA-LCR_extracted-text.zip", "w") as archive:
        garbled = "the EU’s a.txt".encode().decode("cp437")  # as two of the published names are
        for name, text in (("b.txt", "Text b\n"), (garbled, "Text {a}")):
            archive.writestr(f"lcr/Company_Documents/co_dc/{name}", text)
    (tmp_path / "AA-LCR_Dataset.csv").write_text(table, encoding="utf-8-sig")
    return tmp_path / "AA-LCR_Dataset.csv"


@pytest.mark.parametrize("folder", ["extracted_text", "."])
def test_aa_lcr_as_published(tmp_path: Path, folder: str) -> None:
    (item,) = load("aa-lcr", lcr(tmp_path, folder=folder))
    assert (item.id, item.group) == ("1", "Company_Documents")
    assert item.messages[0]["content"] == (
        "BEGIN INPUT DOCUMENTS\n\n"
        "BEGIN DOCUMENT 1:\nText b\nEND DOCUMENT 1\n\n"
        "BEGIN DOCUMENT 2:\nText {a}\nEND DOCUMENT 2\n\n"
        "END INPUT DOCUMENTS\n\n"
        "Answer the following question using the input documents provided above.\n\n"
        "START QUESTION\n\nWhich, of both?\n\nEND QUESTION\n"
    )
    judge = Judge("CORRECT")
    assert score("aa-lcr", item, "Equinix", judge).score == 1
    assert judge.asked[0] == (
        "Assess whether the following CANDIDATE ANSWER is CORRECT or INCORRECT.\n"
        "For the CANDIDATE ANSWER to be correct, it must be consistent with the OFFICIAL ANSWER.\n\n"
        "The question, for reference only: Which, of both?\n"
        "The OFFICIAL ANSWER: Equinix, 5%\n"
        "CANDIDATE ANSWER TO ASSESS: Equinix\n\n"
        "Reply only with CORRECT or INCORRECT."
    )
    assert score("aa-lcr", item, "Equinix", Judge("incorrect")).score == 0


def test_aa_lcr_says_what_is_missing(tmp_path: Path) -> None:
    path = lcr(tmp_path, LCR.replace("b.txt", "c.txt"))
    with pytest.raises(TaskError, match=r"question 1: .*no lcr/Company_Documents/co_dc/c\.txt"):
        load("aa-lcr", path)
    (tmp_path / "extracted_text" / "AA-LCR_extracted-text.zip").write_bytes(b"no zip")
    with pytest.raises(TaskError, match=r"cannot read .*\.zip"):
        load("aa-lcr", path)
    (tmp_path / "extracted_text" / "AA-LCR_extracted-text.zip").unlink()
    with pytest.raises(TaskError, match="documents are missing"):
        load("aa-lcr", path)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("longbench-v2", {**LONGBENCH, "answer": "E"}, "record 1: field 'answer': .*'A', 'B'"),
        ("longbench-v2", {**LONGBENCH, "context": ""}, "record 1: field 'context'"),
        ("longmemeval", {**MEMORY, "question_type": "x"}, "record 1: field 'question_type'"),
        ("longmemeval", {**MEMORY, "haystack_dates": []}, "2 haystack_sessions, but 0"),
        (
            "longmemeval",
            {**MEMORY, "haystack_sessions": [[], [{"role": "user"}]]},
            r"field 'haystack_sessions\.1\.0\.content': Field required",
        ),
    ],
)
def test_wrong_data_says_which_record_and_field(
    tmp_path: Path, name: str, record: dict[str, Any], message: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(TaskError, match=message) as caught:
        load(name, path)
    assert "\n" not in str(caught.value)


def test_a_csv_without_its_column(tmp_path: Path) -> None:
    path = lcr(tmp_path, LCR.replace(",answer,", ",answers,"))
    with pytest.raises(TaskError, match=r"\.csv, line 2: field 'answer': Field required"):
        load("aa-lcr", path)
