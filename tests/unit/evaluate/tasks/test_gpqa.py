"""GPQA-Diamond: the order of choices, the prompt, and the letter."""

from __future__ import annotations

import asyncio
import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from mixquant.evaluate.benchmarks.settings import Settings
from mixquant.evaluate.tasks import Item, TaskError
from mixquant.evaluate.tasks.registry import task

COLUMNS = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2"]
COLUMNS += ["Incorrect Answer 3", "Record ID", "High-level domain", "Writer's Difficulty Estimate"]


def load(
    tmp_path: Path, rows: int = 1, protocol: str | None = None, missing: str = ""
) -> list[Item]:
    """As published, a CSV with more columns than are needed."""
    path = tmp_path / "gpqa_diamond.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([name for name in COLUMNS if name != missing])
        for number in range(rows):
            row = ["Which, {x}?\n", "right \n", "wrong 1", "wrong 2", "wrong 3", f"rec{number}"]
            row += ["Physics", "hard"]
            writer.writerow([v for name, v in zip(COLUMNS, row, strict=True) if name != missing])
    return task("gpqa-diamond", protocol=protocol).load(path, lambda text: text)


def choices(item: Item) -> dict[str, str]:
    return dict(re.findall(r"^([A-D])\) (.+)$", item.messages[0]["content"], re.MULTILINE))


def test_as_simple_evals_asks(tmp_path: Path) -> None:
    (item,) = load(tmp_path)
    text = item.messages[0]["content"]
    assert text.startswith(
        "Answer the following multiple choice question. The last line of your response should be of "
        "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
        "step by step before answering.\n\nWhich, {x}?\n\nA) "
    )
    assert (item.id, item.group) == ("rec0", "Physics")
    assert sorted(choices(item).values()) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert choices(item)[item.reference] == "right"
    other = next(letter for letter in "ABCD" if letter != item.reference)
    for said, worth in ((f"Answer: {item.reference}", 1), (f"Answer: {other}", 0), ("Hm.", 0)):
        verdict = asyncio.run(task("gpqa-diamond").score(item, {"text": said}))
        assert (verdict.score, verdict.extracted) == (worth, said != "Hm.")


def test_the_right_answer_is_anywhere_but_always_in_the_same_place(tmp_path: Path) -> None:
    items = load(tmp_path, 80)
    assert min(Counter(item.reference for item in items).values()) > 8
    assert all(choices(item)[item.reference] == "right" for item in items)
    assert load(tmp_path, 80) == items


def test_in_the_protocol_of_mix_quants_authors(tmp_path: Path) -> None:
    (ours,), (item,) = load(tmp_path), load(tmp_path, protocol="mix-quant")
    problem = ours.messages[0]["content"].partition("answering.\n\n")[2]
    assert item.messages[0]["content"] == f"Put your final answer within \\boxed{{}}.\n{problem}"
    one = task("gpqa-diamond", protocol="mix-quant")
    settings = Settings.of(one, {}, None)
    assert (settings.first_seed, settings.max_tokens) == (42, 32_768)
    text = rf"So \boxed{{{item.reference}}}"
    assert asyncio.run(one.score(item, {"text": text})).score == 1


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"line 4: field 'Incorrect Answer 2': Field required"):
        load(tmp_path, missing="Incorrect Answer 2")
