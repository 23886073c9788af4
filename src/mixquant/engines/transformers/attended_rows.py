"""Which rows of a pass attend in the kernel: what its plan and its masks say.

Which rows are quantized is the plan's word. They go to the kernel only if the mask lets each of them see
exactly the tokens before it: a sliding window within reach, packed sequences or a bidirectional prefix
stay SDPA's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixquant.core.phase import Range
from mixquant.kernels.cpu.attention import Precision


@dataclass(frozen=True)
class Causal:
    """What a mask was found to be, in numbers.

    Attributes:
        context: how many keys stand before the pass's first row.
        rows: per sequence, those that attend in the kernel: the first, and the one behind the last.
        padding: per sequence, how many keys at its start nobody sees.
    """

    context: int
    rows: list[Range]
    padding: list[int]


@dataclass
class AttendedRows:
    """Which rows of a pass attend in the kernel, and what its masks were found to be.

    Attributes:
        ranges: of row numbers, as in a plan.
        precision: None for what each module was chosen for.
    """

    ranges: tuple[Range, ...]
    precision: Precision | None = None
    _masks: dict[tuple[int, int], tuple[Tensor | None, Causal | None]] = field(default_factory=dict)

    def under(self, mask: Tensor | None, sequences: int, rows: int, keys: int) -> Causal | None:
        """The `Causal` of a mask, computed once a pass. None: it is not causal, or no row attends."""
        seen = (id(mask), keys)
        if seen not in self._masks:
            # Kept with the mask itself: while it lives, no other has its identity.
            self._masks[seen] = mask, _causal(self._by_sequence(sequences, rows), mask, rows, keys)
        return self._masks[seen][1]

    def _by_sequence(self, sequences: int, rows: int) -> list[Range]:
        own: list[Range] = []
        for first in range(0, sequences * rows, rows):
            pieces = [
                (max(start - first, 0), min(stop - first, rows))
                for start, stop in self.ranges
                if start < first + rows and stop > first
            ]
            own.append((pieces[0][0], pieces[-1][1]) if pieces else (0, 0))
        return own


def _causal(own: list[Range], mask: Tensor | None, rows: int, keys: int) -> Causal | None:
    if not any(start < stop for start, stop in own):
        return None
    if mask is None:  # the diagonal begins at the first key, whatever the cache has room for
        return Causal(0, own, [0] * len(own))
    if mask.dtype != torch.bool or mask.shape not in (
        (1, 1, rows, keys),
        (len(own), 1, rows, keys),
    ):
        return None
    context: int | None = None
    padding = []
    for sequence, (start, stop) in enumerate(own):
        visible = mask.expand(len(own), -1, -1, -1)[sequence, 0, start:stop]
        columns = visible[-1].nonzero()[:, 0] if start < stop else None
        if columns is None or not len(columns):
            own[sequence] = (0, 0)
            padding.append(0)
            continue
        before, end = int(columns[0]), int(columns[-1]) + 1
        if context is None:
            context = end - stop
        first = max(start, before - context)  # rows before it are padding themselves
        at = torch.arange(keys)
        limit = torch.arange(context + first + 1, context + stop + 1)[:, None]
        if context != end - stop or not torch.equal(
            visible[first - start :], (at >= before) & (at < limit)
        ):
            return None
        own[sequence] = (first, stop)
        padding.append(before)
    if context is None or context < 0 or context + rows > keys:
        return None
    return Causal(context, own, padding)
