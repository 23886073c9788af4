"""JSON in which no object has a key twice: Python's parser takes the last one, silently."""

from __future__ import annotations

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """A key that stands twice in one object. The message names it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice in one object")


def loads(text: str, **options: Any) -> Any:
    """What `json.loads` returns, with its options.

    Raises:
        DuplicateKeyError: an object has a key twice.
        json.JSONDecodeError: no JSON.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates, **options)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise DuplicateKeyError(key)
        values[key] = value
    return values
