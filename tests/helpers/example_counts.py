"""How many examples property tests try."""

from __future__ import annotations

from hypothesis import settings

FAST, THOROUGH = 25, 100  # of a test that does not say how many; the profiles in tests/conftest.py


def up_to(count: int) -> int:
    """``max_examples`` of a test that tries ``count`` if there is time, and else a share of them."""
    return max(1, round(count * settings().max_examples / THOROUGH))
