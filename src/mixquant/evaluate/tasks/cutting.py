"""Cuts texts in their middle, by a model's tokenizer."""

from __future__ import annotations

from typing import Any


def cut_middle(text: str, tokenizer: Any, limit: int) -> str:
    """The beginning and the end of a text, as many tokens of each, with nothing between them.

    As in LongBench (arXiv 2308.14508), where instructions and what is asked stand at the ends. The
    cut goes through the text, not through its tokens: both parts are as they were, to the character.

    Args:
        tokenizer: a fast one of Transformers, which says where in the text its tokens are.
        limit: in tokens, without those that mark the beginning and the end of a sequence.

    Returns:
        The text itself if it has at most ``limit`` tokens; else a text that has at most so many, and
        seldom more than one or two fewer.
    """
    if len(text) <= limit and len(text.encode("utf-8", "surrogatepass")) <= limit:
        return text  # no token is shorter than a byte: nothing to count
    offsets = _offsets(text, tokenizer)
    if len(offsets) <= limit:
        return text
    keep = limit
    while keep > 0:
        head = text[: offsets[keep - keep // 2 - 1][1]]
        tail = text[offsets[len(offsets) - keep // 2][0] :] if keep > 1 else ""
        # Where the parts meet, and where a character has several tokens, it may be more than counted.
        excess = len(_offsets(head + tail, tokenizer)) - limit
        if excess <= 0:
            return head + tail
        keep -= excess
    return ""


def _offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Each token's first character, and the one after its last."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return offsets
