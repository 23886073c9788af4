"""Which masks are causal, so that the rows under them may attend in the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixquant.engines.transformers.attended_rows import AttendedRows, Causal


def mask_of(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril_(keys - rows)[None, None]


def under(mask: Tensor | None, rows: int, keys: int, sequences: int = 1) -> Any:
    attended = AttendedRows(((0, sequences * rows),))
    return attended.under(mask, sequences, rows, keys)


def test_masks_that_are_causal() -> None:
    assert under(None, 5, 9) == Causal(0, [(0, 5)], [0])
    assert under(mask_of(5, 9), 5, 9) == Causal(4, [(0, 5)], [0])
    padded = mask_of(5, 5)
    padded[..., :2] = False
    both = torch.cat([mask_of(5, 5), padded])
    assert under(both, 5, 5, 2) == Causal(0, [(0, 5), (2, 5)], [0, 2])
    room = torch.nn.functional.pad(mask_of(5, 9), (0, 7))  # a static cache's
    assert under(room, 5, 16) == Causal(4, [(0, 5)], [0])


def test_masks_that_are_not() -> None:
    packed = mask_of(6, 6)
    packed[..., 3:, :3] = False
    window = mask_of(6, 6) & ~mask_of(6, 6).roll(-3, -1).tril(-3)
    prefix = mask_of(6, 6)
    prefix[..., :3, :3] = True
    hole = mask_of(6, 6)
    hole[..., 4:, 2] = False
    heads = mask_of(6, 6).expand(1, 2, -1, -1)
    # Of packed sequences the last one's rows see all keys from their first on; the others are SDPA's.
    assert under(packed, 6, 6) == Causal(0, [(3, 6)], [3])
    for mask in (window, prefix, hole, heads, mask_of(6, 6).float()):
        assert under(mask, 6, 6) is None
