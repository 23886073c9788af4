"""Room on Python's own stack for a forward pass.

CPython (read: 3.11 to 3.13) keeps the frames of Python functions in chunks of 16 KiB. A call that needs
another chunk maps it, and its return unmaps it (``push_chunk`` in ``Python/pystate.c``). Where a chunk
happens to end just above the functions that a model calls for each of its layers, each layer pays for
both, and for the page faults behind them. A turn of few tokens waits for the CPU anyway, and mixquant
puts frames of its own below those of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ROOM = 60 * 1024
"""Bytes that the frames of the called function and of all that it calls may take."""

_SLOTS = 8300
"""Of 8 bytes: more than half of a chunk of 128 KiB, so that the frame gets such a chunk to itself."""


def with_room(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function whose calls find `ROOM` on the stack."""
    return function(*args, **kwargs)


# The memory is reserved, not written: what a frame may push is not cleared.
with_room.__code__ = with_room.__code__.replace(co_stacksize=_SLOTS)
