"""Calls with room on Python's stack cross no chunk of it."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from mixquant.engines.vllm.stack import ROOM, with_room

CALLS = 200
DEPTHS = range(1, 250)


def _leaf(number: int) -> int:
    return number + 1


def _faults_of_calls() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for number in range(CALLS):
        _leaf(number)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _below(depth: int) -> int:
    """The page faults of `CALLS` calls that stand below so many frames."""
    return _faults_of_calls() if depth == 0 else _below(depth - 1)


def test_calls_at_no_depth_map_memory() -> None:
    # Somewhere a chunk ends: each call maps and unmaps the next one.
    assert max(_below(depth) for depth in DEPTHS) >= CALLS
    assert max(with_room(_below, depth) for depth in DEPTHS) < CALLS / 10


def test_room_is_that_of_some_hundred_frames() -> None:
    frame = 8 * (_below.__code__.co_stacksize + _below.__code__.co_nlocals + 10)
    assert DEPTHS[-1] * frame < ROOM


def test_arguments_results_and_errors_go_through() -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert with_room(function, 1, 2, name=3) == ((1, 2), {"name": 3})
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)
