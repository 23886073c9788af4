"""The protocol of Mix-Quant's authors: what is asked and scored otherwise than by default."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mixquant.evaluate.benchmarks.settings import Settings
from mixquant.evaluate.tasks import Item, Task, Verdict
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
