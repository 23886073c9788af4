"""How the rows of a pass go through the FP8 layers of a Hopper: planned once, read by each layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixquant.core.phase import PhasePlan
from mixquant.core.rows import index_of
from mixquant.kernels.triton import FEW_ROWS


class Route:
    """How the rows of one plan go through each of its layers.

    Attributes:
        quantized: the rows that are multiplied with the copy: all that should be, and others that lie
            among them or beside them, whose products are then written over.
        index: the precise rows, int64, or None if there are none.
        few: whether the kernel for few rows multiplies them.
    """

    def __init__(self, plan: PhasePlan, device: torch.device) -> None:
        self.rows = plan.rows
        first, last = plan.quantized[0][0], plan.quantized[-1][1]
        count = plan.precise_rows
        padded = plan.quantized_rows + count < plan.rows
        self.index = index_of(plan, "precise", device) if count else None
        self.few = 0 < count <= FEW_ROWS
        # Padding is read by nobody, but must not be what lay in this memory.
        some = last - first < 0.9 * plan.rows and not padded
        # cuBLASLt needs scales at multiples of 16 bytes.
        self.quantized = (first - first % 4, last) if some else (0, plan.rows)
        self._precise_numbers: Tensor | None = None
        self._buffers: dict[tuple[int, bool], tuple[Any, tuple[Tensor, Tensor]]] = {}

    def buffers(
        self, width: int, with_precise: bool, device: torch.device
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Buffers for the codes of all rows, and what of them is multiplied: the same for all layers.

        Layers follow each other on one stream, so the next one's codes may take the place of the last
        one's.

        Args:
            with_precise: whether the precise rows are put apart as they are quantized.
        """
        found = self._buffers.get((width, with_precise))
        if found is None:
            from mixquant.kernels.triton.fused import empty_codes

            codes = empty_codes("fp8", self.rows, width, device)
            if with_precise and self.index is not None:
                precise = torch.empty(len(self.index), width, dtype=torch.bfloat16, device=device)
                numbers = self._precise_numbers_on(device)
                codes = replace(codes, precise=precise, precise_numbers=numbers)
            rows = slice(*self.quantized)
            found = codes, (codes.codes[rows], codes.scale[rows])
            self._buffers[width, with_precise] = found
        return found

    def _precise_numbers_on(self, device: torch.device) -> Tensor:
        """Which of the precise rows each row is, int32, or -1."""
        if self._precise_numbers is None:
            assert self.index is not None
            none = torch.full((self.rows,), -1, dtype=torch.int32, device=device)
            numbers = torch.arange(len(self.index), dtype=torch.int32, device=device)
            self._precise_numbers = none.index_copy_(0, self.index, numbers)
        return self._precise_numbers


class StaticRoute(Route):
    """The route of a pass that is captured into a CUDA graph: its precise rows are filled in later.

    Args:
        index: where the numbers of up to `FEW_ROWS` precise rows will stand, int64, the rest -1.
        numbers: where for each row will stand which of the precise rows it is, int32, or -1.
    """

    def __init__(self, rows: int, index: Tensor, numbers: Tensor) -> None:
        self.rows = rows
        self.index = index
        self.few = True
        self.quantized = (0, rows)
        self._numbers = numbers

    def buffers(
        self, width: int, with_precise: bool, device: torch.device
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """As `Route`'s, but new ones: in a graph's memory they take each other's place."""
        from mixquant.kernels.triton.fused import empty_codes

        codes = empty_codes("fp8", self.rows, width, device)
        if with_precise:
            precise = torch.empty(FEW_ROWS, width, dtype=torch.bfloat16, device=device)
            codes = replace(codes, precise=precise, precise_numbers=self._numbers)
        return codes, (codes.codes, codes.scale)
