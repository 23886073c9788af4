"""Texts cut in their middle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mixquant.evaluate.tasks.cutting import cut_middle


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# Words, numbers, and characters of several tokens each.
TEXTS = st.lists(
    st.sampled_from(
        ["word ", "Straße ", "漢字", "🙂", "12345", "\n\n", " ", "<|im_end|>", "e\u0301"]
    )
    | st.text(max_size=8),
    max_size=60,
).map("".join)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, limit=st.integers(1, 80))
def test_never_longer_than_the_limit_and_both_ends_kept(
    tokenizer: Any, text: str, limit: int
) -> None:
    cut = cut_middle(text, tokenizer, limit)
    assert count(tokenizer, cut) <= limit
    if count(tokenizer, text) <= limit:
        assert cut == text
    else:
        assert any(
            text.startswith(cut[:place]) and text.endswith(cut[place:])
            for place in range(len(cut) + 1)
        )


def test_half_of_what_is_kept_stands_at_each_end(tokenizer: Any) -> None:
    text = " ".join(f"beginning{number}" for number in range(500))
    text += " ".join(f"end{number}" for number in range(500))
    cut = cut_middle(text, tokenizer, 101)
    assert count(tokenizer, cut) >= 98
    head = next(place for place in range(len(cut)) if not text.startswith(cut[: place + 1]))
    assert 48 <= count(tokenizer, cut[:head]) <= 53
    assert 48 <= count(tokenizer, cut[head:]) <= 53


def test_a_limit_of_one_token_keeps_the_first(tokenizer: Any) -> None:
    assert cut_middle("one two three", tokenizer, 1) == "one"
