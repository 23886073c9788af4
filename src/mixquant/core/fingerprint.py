"""Detects that a weight is no longer the one that its quantized copy was made from.

A library that writes through ``weight.data`` (PEFT, when it merges an adapter) changes only the
numbers: the tensor, its address and its version stay the same. So some of the numbers are kept and
compared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

WORD = 8  # bytes


def sample(weight: Tensor) -> Tensor:
    """Elements of a matrix ``[N, K]``, some of every row and of every column.

    Returns:
        A vector: of INT64 words, each of them the bits of elements that are neighbours in a row, or of
        elements where a row is no whole number of words. It is a view if the matrix is contiguous.
    """
    flat = weight.detach().reshape(-1)
    rows, columns = weight.shape
    size = weight.element_size()
    if columns * size % WORD == flat.storage_offset() * size % WORD == 0:
        flat, columns = flat.view(torch.int64), columns * size // WORD
    # A step short of a row, so that each row has one further to the left; or shorter, so that there
    # are enough of them for all columns, which then take turns.
    step = max(1, min(columns - 1, rows))
    while math.gcd(step, columns) > 1:
        step -= 1
    return flat[::step]


class Origin:
    """A weight ``[N, K]`` as it was when something was made of it."""

    def __init__(self, weight: Tensor) -> None:
        # Not its id, nor its address alone: both may be another's once it is freed.
        self._tensor = weakref.ref(weight)
        self._state = _state(weight)
        self.sample = sample(weight).clone()

    def looks_like(self, weight: Tensor) -> bool:
        """Whether this is the tensor, and nothing was written to it but through ``.data``."""
        return self._tensor() is weight and self._state == _state(weight)


def changed(pairs: Iterable[tuple[Origin, Tensor]]) -> list[bool]:
    """Which weights are another than they were, by tensor, version and sample.

    A few operators and one wait for the device, however many weights there are, if none is.
    """
    pairs = list(pairs)
    found = [not origin.looks_like(weight) for origin, weight in pairs]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (origin, weight) in enumerate(pairs):
        if not found[index]:
            groups.setdefault((weight.device, origin.sample.dtype), []).append(index)
    with torch.no_grad():
        for members in groups.values():
            now = [sample(pairs[index][1]) for index in members]
            then = [pairs[index][0].sample for index in members]
            if not torch.equal(torch.cat(now), torch.cat(then)):
                for index, one, other in zip(members, now, then, strict=True):
                    found[index] = not torch.equal(one, other)
    return found


def _state(weight: Tensor) -> tuple[object, ...]:
    version = None if weight.is_inference() else weight._version
    return (weight.data_ptr(), version, weight.shape, weight.dtype, weight.device)
