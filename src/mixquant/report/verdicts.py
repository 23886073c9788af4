"""Ratios to BF16 as a sentence: faster, slower or neither."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mixquant.report.derived import sign_of
from mixquant.report.text import times

_CLOSE = 0.05


def times_range(ratios: Sequence[float]) -> str:
    """``1.10 to 1.39 times``."""
    low, high = (times(f(ratios)).removesuffix("×") for f in (min, max))
    return f"{low} times" if low == high else f"{low} to {high} times"


def no_difference(ratios: Sequence[float]) -> str:
    """For ratios of which none is a clear difference: whether they are small, or only unsure."""
    close = all(abs(ratio - 1) < _CLOSE for ratio in ratios)
    return "about as fast as BF16" if close else "not clearly different from BF16"


def in_words(
    subject: str, ratios: Sequence[float], where: str = "", signs: Collection[int] | None = None
) -> str:
    """``SUBJECT is 1.39 times as fast as BF16 WHERE``, and plainly so when it is slower.

    Args:
        ratios: at least one; above 1 is faster.
        signs: whether each is a difference at all, where more is known than the ratio.
    """
    found = set(map(sign_of, ratios) if signs is None else signs)
    where = f" {where}" if where else ""
    if found == {-1}:
        return f"{subject} is slower than BF16{where}: {times_range(ratios)} as fast"
    if found == {0}:
        return f"{subject} is {no_difference(ratios)}{where} ({times_range(ratios)})"
    if found == {-1, 0}:
        return f"{subject} is no faster than BF16{where}: {times_range(ratios)} as fast"
    return f"{subject} is {times_range(ratios)} as fast as BF16{where}"
