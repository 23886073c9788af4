"""Where benchmarks' data come from when no file is given: the Hub's client, replaced by a recorder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixquant.evaluate.tasks import TaskError
from mixquant.evaluate.tasks.registry import TASKS, task

datasets = pytest.importorskip("datasets")

PROBLEM = {"unique_id": "a", "id": 1, "problem": "1+1?", "answer": "2"}
WORD_PROBLEM = {"question": "1+1?", "answer": "#### 2"}
CHOICE = {f"choice_{letter}": letter for letter in "ABCD"}
READING = {
    "_id": "a",
    "length": "long",
    "question": "?",
    "answer": "C",
    "context": "text",
    **CHOICE,
}
HARD = {"Question": "?", "Correct Answer": "1", "Record ID": "a"}
HARD |= {f"Incorrect Answer {number}": "0" for number in (1, 2, 3)}


@pytest.mark.parametrize(
    ("name", "repository", "subset", "split", "row"),
    [
        ("math500", "HuggingFaceH4/MATH-500", None, "test", PROBLEM),
        ("aime24", "HuggingFaceH4/aime_2024", None, "train", PROBLEM),
        ("aime25", "math-ai/aime25", None, "test", PROBLEM),
        ("gsm8k", "openai/gsm8k", "main", "test", WORD_PROBLEM),
        ("gpqa-diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", HARD),
        ("longbench-v2", "zai-org/LongBench-v2", None, "train", READING),
    ],
)
def test_data_sets_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    repository: str,
    subset: str | None,
    split: str,
    row: dict[str, Any],
) -> None:
    asked = []

    def load(path: str, config: str | None, *, split: str) -> Any:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (item,) = task(name).load(None, cut=lambda text: text)
    assert asked == [(repository, subset, split)]
    assert item.reference in ("2", "C") or name == "gpqa-diamond"


def test_a_row_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PROBLEM, {**PROBLEM, "answer": "x"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(TaskError, match=r"math-ai/aime25, split test, row 2: field 'answer'"):
        task("aime25").load(None, cut=lambda text: text)


def test_files_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {
        "question_id": "a",
        "question_type": "multi-session",
        "question": "?",
        "answer": 3,
        "question_date": "2023/05/30",
        "haystack_dates": [],
        "haystack_sessions": [],
    }
    (tmp_path / "longmemeval_s_cleaned.json").write_text(json.dumps([record]))
    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    (item,) = task("longmemeval").load(None, cut=lambda text: text)
    assert item.reference["answer"] == "3"
    repository = "xiaowu0162/longmemeval-cleaned"
    assert asked == [(repository, "longmemeval_s_cleaned.json", "dataset")]


@pytest.mark.parametrize("name", ["longmemeval", "aa-lcr"])
def test_without_network_the_message_says_what_to_do(name: str) -> None:
    with pytest.raises(TaskError, match=r"cannot load .* from the Hub .*--data") as caught:
        task(name).load(None, cut=lambda text: text)
    assert "\n" not in str(caught.value)


def test_every_benchmark_is_there_under_its_name() -> None:
    for name in TASKS:
        benchmark = task(name)
        assert benchmark.name == name
        assert benchmark.needs_judge == (name in ("longmemeval", "aa-lcr", "tau2-bench"))
