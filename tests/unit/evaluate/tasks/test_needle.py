"""Needles in a haystack: the prompts, how long they are, and how answers are scored."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.checkpoints.errors import ModelError
from mixquant.conversation import render
from mixquant.evaluate.benchmarks.settings import PromptTokens, estimated_tokens
from mixquant.evaluate.tasks import Item, PromptLimits, TaskError, Verdict
from mixquant.evaluate.tasks.needle import ANSWER, NEEDLE_KINDS, SAMPLES, Needle, fill
from mixquant.evaluate.tasks.registry import task


def words(text: str) -> int:
    """Counts for tests that need no model: one token a word."""
    return len(text.split())


def load(
    lengths: list[int], data: Path | None = None, limits: PromptLimits | None = None
) -> list[Item]:
    needle = task("needle", {"lengths": lengths})
    needle.limits = limits or PromptLimits(words, None, ANSWER)
    return needle.load(data, lambda text: text)


def one(items: list[Item], kind: str) -> Item:
    return next(item for item in items if item.group.endswith(kind))


def text(item: Item) -> str:
    return str(item.messages[0]["content"])


def score(item: Item, answer: str) -> Verdict:
    return asyncio.run(Needle().score(item, {"text": answer}))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return load([1024])


def test_prompts_are_rulers(items: list[Item]) -> None:
    single = text(one(items, "single-1"))
    assert single.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\nThe grass is green. The sky is blue."
    )
    assert re.search(r"\nOne of the special magic numbers for \w+-\w+ is: \d{7}\.\n", single)
    assert re.search(
        r"\nWhat is the special magic number for \w+-\w+ mentioned in the provided text\?$", single
    )
    uuids = text(one(items, "single-3"))
    assert re.search(r"One of the special magic uuids for \w+-\w+ is: [0-9a-f-]{36}\.", uuids)
    assert uuids.startswith("A special magic uuid is hidden")
    several = text(one(items, "multivalue"))
    assert several.startswith("Some special magic numbers are hidden within the following text.")
    assert re.search(r"What are all the special magic numbers for \w+-\w+ mentioned", several)
    asked = text(one(items, "multiquery"))
    assert re.search(r"for (\w+-\w+, ){3}and \w+-\w+ mentioned in the provided text\?$", asked)


@pytest.mark.parametrize(
    ("kind", "needles", "answers"),
    [("single-1", 1, 1), ("single-2", 1, 1), ("single-3", 1, 1), ("multikey-1", 4, 1)]
    + [("multivalue", 4, 4), ("multiquery", 4, 4), ("multikey-2", None, 1)]
    + [("multikey-3", None, 1)],
)
def test_every_question_has_its_answers_in_the_text_and_no_others(
    items: list[Item], kind: str, needles: int | None, answers: int
) -> None:
    for item in (item for item in items if item.group == f"1024 {kind}"):
        hidden = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text(item))
        if needles is None:
            assert len(hidden) > 10
        else:
            assert len(hidden) == needles
        asked = text(item).rpartition(" for ")[2].partition(" mentioned")[0]
        keys = set(re.findall(r"[\w-]+-[\w-]+", asked))
        assert sorted(value for key, value in hidden if key in keys) == sorted(
            item.reference["values"]
        )
        assert len(item.reference["values"]) == answers
        assert len({value for _, value in hidden}) == len(hidden)


def test_each_kind_has_as_many_items_in_the_same_order_every_time(items: list[Item]) -> None:
    assert Counter(item.group for item in items) == {
        f"1024 {kind.name}": SAMPLES for kind in NEEDLE_KINDS
    }
    assert {item.also for item in items} == {("1024",)}
    assert load([1024]) == items
    assert len({text(item) for item in items}) == len(items)


def test_needles_stand_at_all_depths(items: list[Item]) -> None:
    depths = [
        text(item).index(item.reference["values"][0]) / len(text(item))
        for item in items
        if "single" in item.group
    ]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_a_text_of_the_users_is_the_haystack(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("The harvest was poor that year. Nobody minded.")
    prompt = text(one(load([512], path), "single-2"))
    assert prompt.count("Nobody minded.") > 20  # a short text is repeated
    path.write_text(" ")
    with pytest.raises(TaskError, match=r"essay\.txt holds no text"):
        load([512], path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match="not UTF-8"):
        load([512], path)
    with pytest.raises(TaskError, match="cannot read"):
        load([512], tmp_path / "none.txt")


@pytest.mark.parametrize("length", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_lengths_hold_in_the_models_own_tokens(smollm2: tuple[Any, Any], length: int) -> None:
    _, tokenizer = smollm2
    limits = PromptLimits(PromptTokens(lambda: tokenizer, print), 8192, ANSWER)
    for item in load([length], limits=limits)[:: SAMPLES // 2]:
        chat = render(tokenizer, item.messages)
        tokens = len(tokenizer(chat, add_special_tokens=False)["input_ids"]) + ANSWER
        # One more needle of two UUIDs, the largest piece, would not have fitted.
        assert length - 100 < tokens <= length, item.id


def test_without_a_tokenizer_lengths_are_estimated_and_never_too_long(
    smollm2: tuple[Any, Any],
) -> None:
    def none() -> Any:
        raise ModelError("stub is not a model")

    notes: list[str] = []
    for item in load([2048], limits=PromptLimits(PromptTokens(none, notes.append), None, ANSWER)):
        tokens = len(smollm2[1](text(item))["input_ids"])
        assert 0.7 * (2048 - ANSWER - 64) < tokens <= 2048 - ANSWER - 64
    assert notes == ["lengths of prompts are estimated: stub is not a model"]
    assert estimated_tokens("") == 0


@given(st.integers(30, 3000), st.integers(1, 60), st.integers(0, 500))
def test_a_prompt_is_filled_as_far_as_it_goes(limit: int, each: int, guess: int) -> None:
    pieces = fill(lambda n: "x" * (30 + n * each), len, limit, guess)
    assert pieces == (limit - 30) // each


def test_a_length_without_room_for_the_needles() -> None:
    with pytest.raises(TaskError, match="no room for the needles: give a longer --length"):
        fill(lambda n: "x" * (30 + n), len, 29)


def test_lengths_are_those_that_the_model_has_room_for() -> None:
    def lengths(given: list[int], context: int | None, answer: int = ANSWER) -> list[str]:
        items = load(given, limits=PromptLimits(words, context, answer))
        return list(dict.fromkeys(item.also[0] for item in items))

    assert lengths([], None) == ["1024", "2048", "4096", "8192"]
    assert lengths([], 4096) == ["1024", "2048", "4096"]
    assert lengths([], 4096, 1000) == ["1024", "2048"]
    assert lengths([2048, 1024], 4096) == ["2048", "1024"]
    with pytest.raises(TaskError, match=r"a length of 8192 .* needs more than the model's 4096"):
        lengths([1024, 8192], 4096)
    with pytest.raises(TaskError, match="give a smaller --length or --max-tokens"):
        lengths([], 512)
    for wrong in (511, 131_073):
        with pytest.raises(TaskError, match=f"--length {wrong}: .* 512 to 131072 tokens"):
            lengths([wrong], None)


def test_answers_are_scored_by_the_share_of_values_in_them(items: list[Item]) -> None:
    item = one(items, "multivalue")
    first, second, third, fourth = item.reference["values"]
    everything = score(item, f"They are {fourth}, {third}, {second} and {first}.")
    assert (everything.score, everything.detail) == (1, "all found")
    half = score(item, f"<think>{third}</think>{first} and {second}, as well as 0000000.")
    assert half == Verdict(0.5, f"missing: {third}, {fourth}")
    assert score(item, "There are none.") == Verdict(
        0, f"missing: {first}, {second}, {third}, {fourth}", extracted=False
    )
    assert score(item, "It is 1234567.").extracted
    uuid = one(items, "single-3")
    (value,) = uuid.reference["values"]
    assert score(uuid, value.upper()).score == 1
    assert not score(uuid, "I do not know.").extracted
