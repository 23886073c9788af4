"""The texts that come with Python, and how they are cut."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest

from mixquant.evaluate.fidelity.passages import PassageError, cut, documentation


def test_built_in_texts_are_distinct_and_long() -> None:
    texts = documentation(4)
    assert len(texts) == len({text[:500] for text in texts.values()}) == 4
    assert sum(len(text) for text in texts.values()) >= sum(map(len, topics.values()))
    assert min(map(len, texts.values())) > 80_000
    with pytest.raises(PassageError, match=f"has {len(topics)} texts, not 1000"):
        documentation(1000)


def test_what_follows_in_the_text(smollm2: tuple[Any, Any]) -> None:
    texts = documentation(2)
    short, long = cut(texts, smollm2[1], [50, 100], 20)
    for number, text in enumerate(texts.values()):
        tokens = smollm2[1](text)["input_ids"]
        assert list(short.prompts[number] + short.continuations[number]) == tokens[:70]
        assert list(long.prompts[number] + long.continuations[number]) == tokens[:120]
        assert len(long.prompts[number]) == long.prompt_tokens == 100
