"""The protocol of Mix-Quant's authors: what is asked and scored otherwise than by default."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mixquant.evaluate.benchmarks.settings import Settings
from mixquant.evaluate.tasks import Item, JudgeError, Reply, Task, TaskError, Verdict
from mixquant.evaluate.tasks.registry import PROTOCOLS, TASKS, task

pytest.importorskip("math_verify", reason="the extra `eval` is not installed")

PROTOCOL = "mix-quant"


def chosen(name: str, **options: Any) -> Task:
    return task(name, options, PROTOCOL)


def score(one: Task, item: Item, text: str, judge: Any = None, **answer: Any) -> Verdict:
    return asyncio.run(one.score(item, {"text": text, **answer}, judge))


def load(one: Task, path: Path, record: dict[str, Any], cut: Any = lambda text: text) -> Item:
    path.write_text(json.dumps([record]))
    (item,) = one.load(path, cut)
    return item


def test_it_names_benchmarks_that_there_are() -> None:
    for name in PROTOCOLS[PROTOCOL]:
        ours, theirs = task(name), chosen(name)
        assert ours.name == theirs.name == name
        assert isinstance(theirs, type(ours))
        assert Settings.of(theirs, {}, None).first_seed == 42
    assert set(PROTOCOLS[PROTOCOL]) < set(TASKS)
    assert type(chosen("bfcl-v4")) is type(task("bfcl-v4"))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("math500", {"problem": "What is {1}?", "answer": "1", "unique_id": "a"}),
        ("aime24", {"problem": "What is {1}?", "answer": "1", "id": "a"}),
        ("aime25", {"problem": "What is {1}?", "answer": "1", "id": "a"}),
        ("gsm8k", {"question": "What is {1}?", "answer": "#### 1", "id": "a"}),
    ],
)
def test_mathematics(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    one = chosen(name)
    item = load(one, tmp_path / "data.json", record)
    assert item.messages == (
        {"role": "user", "content": "Put your final answer within \\boxed{}.\nWhat is {1}?"},
    )
    settings = Settings.of(one, {}, None)
    assert (settings.seeds, settings.first_seed, settings.max_tokens) == (1, 42, 32768)
    assert score(one, item, r"So \boxed{1}.").score == 1


def test_a_box_in_a_thought_counts_if_there_is_no_other(tmp_path: Path) -> None:
    record = {"problem": "1?", "answer": "1", "unique_id": "a"}
    item = load(chosen("math500"), tmp_path / "data.json", record)
    for one, worth in ((chosen("math500"), 1), (task("math500"), 0)):
        found = score(one, item, "", reasoning=r"It is \boxed{1}, but")
        assert (found.score, found.extracted) == (worth, bool(worth))
        assert score(one, item, r"\boxed{2}", reasoning=r"\boxed{1}").score == 0


DOCUMENT = {
    "_id": "66f36490821e116aacb2cc22",
    "difficulty": "hard",
    "length": "long",
    "question": "What does $Q$ stand for?",
    "choice_A": "Quarter",
    "choice_B": "Question",
    "choice_C": "Queue",
    "choice_D": "$DOC$",
    "answer": "B",
    "context": " A document of $C_A$.\n",
    "retrieved_context": [
        {"c_idx": 7, "content": "later"},
        {"c_idx": 2, "content": "sooner"},
        {"c_idx": 3, "content": "third"},
    ],
}
CHOICES = "Choices:\n(A) Quarter\n(B) Question\n(C) Queue\n(D) $DOC$\n\n"
QUESTION = f"What is the correct answer to this question: What does $Q$ stand for?\n{CHOICES}"
FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            "Please read the following text and answer the questions below.\n\n"
            f"<text>\nA document of $C_A$.\n</text>\n\n{QUESTION}{FORMAT}",
        ),
        (
            {"cot": False},
            "Please read the following text and answer the question below.\n\n"
            f"<text>\nA document of $C_A$.\n</text>\n\n{QUESTION}{FORMAT}",
        ),
        (
            {"no_context": True},
            f"{QUESTION}What is the single, most likely answer choice? {FORMAT}",
        ),
        (
            {"retrieved": 2},
            "Please read the following retrieved text chunks and answer the question below.\n\n"
            "<text>\nRetrieved chunk 1: sooner\n\nRetrieved chunk 2: later\n</text>\n\n"
            f"{QUESTION}{FORMAT}",
        ),
    ],
)
def test_longbench(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    cuts: list[str] = []

    def cut(text: str) -> str:
        cuts.append(text)
        return "CUT"

    one = chosen("longbench-v2", **options)
    item = load(one, tmp_path / "data.json", DOCUMENT, cut)
    assert cuts == [expected]  # the whole prompt
    assert item.messages[0]["content"] == "CUT"
    assert (item.group, item.also) == ("long", ("hard",))
    whole = load(task("longbench-v2", options), tmp_path / "data.json", DOCUMENT)
    text = whole.messages[0]["content"]
    assert text == expected.replace(
        "questions below", "question below"
    )  # ours: no chain of thought


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("Qwen/Qwen3-8B", 100_000),
        ("/models/Qwen3-8B-NVFP4", 100_000),
        ("Qwen/Qwen3.5-9B", 120_000),
        ("google/gemma-4-31B-it", 120_000),
    ],
)
def test_longbench_is_cut_by_model_and_leaves_room_for_the_answer(model: str, tokens: int) -> None:
    settings = Settings.of(chosen("longbench-v2"), {}, 131_072, model)
    assert (settings.context_tokens, settings.max_tokens) == (tokens, 30_720)
    assert (settings.seeds, settings.first_seed, settings.top_k) == (1, 42, 20)
    assert settings.sampling["extra_body"]["skip_special_tokens"] is False
    assert "skip_special_tokens" not in Settings().sampling["extra_body"]


@pytest.mark.parametrize(
    ("text", "reasoning", "letter"),
    [
        ("The correct answer is (B).", "", "B"),
        ("**The correct answer is** (A). No: the correct answer is (B)", "", "B"),
        ("Final answer: (C)\nOption D is wrong", "", "D"),
        ("answer：b", "", "B"),
        ("I cannot say.", "so the correct answer is C", "C"),
        ("The correct answer is (A).", "the correct answer is C", "A"),
        ("<|channel>thought the correct answer is (A)<channel|>Answer: B", "", "B"),
        ("Surely B", "", None),
        ("", "", None),
    ],
)
def test_the_last_letter_that_is_announced(text: str, reasoning: str, letter: str | None) -> None:
    one: Any = chosen("longbench-v2")
    assert one.letter({"text": text, "reasoning": reasoning}) == letter


def test_without_a_chain_of_thought_the_format_is_strict() -> None:
    one: Any = chosen("longbench-v2", cot=False)
    assert one.letter({"text": "**The correct answer is (B)**; the correct answer is (A)"}) == "B"
    assert one.letter({"text": "The correct answer is C."}) == "C"
    assert one.letter({"text": "Answer: C"}) is None


def test_pieces_have_to_be_in_the_data(tmp_path: Path) -> None:
    record = {**DOCUMENT, "retrieved_context": None}
    with pytest.raises(TaskError, match=r"question 66f.*'retrieved_context': --retrieved needs"):
        load(chosen("longbench-v2", retrieved=2), tmp_path / "data.json", record)
    with pytest.raises(TaskError, match="exclude each other"):
        chosen("longbench-v2", no_context=True, retrieved=2)


MEMORY = {
    "question_id": "e47becba",
    "question_type": "single-session-user",
    "question": "What degree did I graduate with?",
    "answer": "Business Administration",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/25 (Thu) 01:00", "2023/05/20 (Sat) 02:21"],
    "haystack_sessions": [
        [{"role": "user", "content": "Later {1} "}, {"role": "assistant", "content": "\nyes"}],
        [{"role": "user", "content": "I graduated."}],
    ],
}


class Judge:
    """Says one thing, and keeps what it was asked."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.asked: list[dict[str, Any]] = []

    async def ask(self, messages: Any, **options: Any) -> Reply:
        self.asked.append({"content": messages[0]["content"], **options})
        return Reply(self.reply)


def test_longmemeval(tmp_path: Path) -> None:
    cuts: list[str] = []
    one = chosen("longmemeval")

    def cut(text: str) -> str:
        cuts.append(text)
        return "CUT"

    item = load(one, tmp_path / "data.json", MEMORY, cut)
    assert item.messages[0]["content"] == "CUT"
    assert cuts == [
        "I will give you several history chats between you and a user. Please answer the question "
        "based on the relevant chat history.\n\n\nHistory Chats:\n\n"
        "\n### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n"
        "\n\nuser: I graduated.\n"
        "\n### Session 2:\nSession Date: 2023/05/25 (Thu) 01:00\nSession Content:\n"
        "\n\nuser: Later {1}\n\nassistant: yes\n"
        "\n\nCurrent Date: 2023/05/30 (Tue) 23:40\n"
        "Question: What degree did I graduate with?\nAnswer:"
    ]
    settings = Settings.of(one, {}, None)
    assert (settings.context_tokens, settings.max_tokens) == (112_000, 19_072)
    assert settings.sampling["extra_body"]["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("reply", "worth"), [("Yes.", 1), ("no", 0), ("No, not yes", 1), ("maybe", 0), ("", 0)]
)
def test_the_judge_says_little_once(tmp_path: Path, reply: str, worth: float) -> None:
    one, judge = chosen("longmemeval"), Judge(reply)
    item = load(one, tmp_path / "data.json", MEMORY)
    text = "<|channel>thought law?<channel|>Business"
    assert score(one, item, text, judge).score == worth
    (asked,) = judge.asked
    assert (asked["max_tokens"], asked["temperature"]) == (10, 0)
    assert "Model Response: Business\n\nIs the model response correct?" in asked["content"]
    with pytest.raises(JudgeError, match="no judge"):
        score(one, item, text)
