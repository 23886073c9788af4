"""The few precise rows of a pass whose other rows are quantized: last tokens of prompts, decode rows.

Their product reads the whole BF16 weight for a handful of rows, so it waits for memory. On Hopper a
kernel of ours (`mixquant.kernels.few_rows_triton`) takes them: after the quantized product, on all
multiprocessors, or beside it, on a stream of its own and on four of them, where that product is long
enough to hide it and the rows are a lone prompt's last. docs/performance.md has what was measured, in
mixed passes too, where it did not pay.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixquant.linear import put, select
from mixquant.phase import PhasePlan, Range

MOST_ROWS = 16
LEAST_BESIDE = 6144  # quantized rows
PROGRAMS = 4  # of the kernel, beside their product


@functools.cache
def why_not() -> str | None:
    """Why this machine multiplies precise rows as vLLM does, or None if it does not."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    return None


class FewRows:
    """How the precise rows of one plan are multiplied in each of its layers."""

    def __init__(self, plan: PhasePlan) -> None:
        self.plan = plan
        first, last = plan.quantized[0][0], plan.quantized[-1][1]
        start, stop = plan.precise[0]
        outside = stop <= first or start >= last
        # Where they can be written while the quantized product writes the rest.
        self.place: Range | None = (start, stop) if outside and len(plan.precise) == 1 else None
        # Of a padded pass everything is zeroed first.
        padded = plan.quantized_rows + plan.precise_rows < plan.rows
        self.beside = self.place is not None and not padded and plan.quantized_rows >= LEAST_BESIDE

    def multiply(self, flat: Tensor, layer: Any, method: Any, out: Tensor, programs: int) -> Tensor:
        """Products ``[precise rows, N]``, in their place if they have one of their own."""
        from mixquant.kernels.few_rows_triton import few_rows

        rows = method.input_of(select(flat, self.plan, "precise"))
        place = self.place
        target = (
            rows.new_empty(len(rows), out.shape[1]) if place is None else out[place[0] : place[1]]
        )
        few_rows(rows, layer.weight, target, programs)
        return target

    @contextmanager
    def beside_quantized(
        self, flat: Tensor, layer: Any, method: Any, out: Tensor
    ) -> Iterator[None]:
        """Multiplies them while what the block launches runs; afterwards they are in ``out``."""
        side, begun, done = _side(flat.device)
        main = torch.cuda.current_stream()
        begun.record(main)
        side.wait_event(begun)
        with torch.cuda.stream(side):
            self.multiply(flat, layer, method, out, PROGRAMS)
            done.record(side)
        try:
            yield
        finally:
            main.wait_event(done)

    def after_quantized(self, flat: Tensor, layer: Any, method: Any, out: Tensor) -> None:
        """Multiplies them now, and writes them into ``out``."""
        rows = self.multiply(flat, layer, method, out, _multiprocessors())
        if self.place is None:
            put(rows, out, self.plan, "precise")


def few_rows_of(plan: PhasePlan, dtype: torch.dtype) -> FewRows | None:
    """How a pass's precise rows are multiplied here; None: as vLLM does."""
    if "few rows" not in plan.memo:
        fits = 0 < plan.precise_rows <= MOST_ROWS and plan.quantized and why_not() is None
        plan.memo["few rows"] = FewRows(plan) if fits else None
    found: FewRows | None = plan.memo["few rows"]
    return found if dtype == torch.bfloat16 else None


def warm_up(device: torch.device) -> None:
    """Has the kernels compiled before the first request waits for them."""
    if why_not() is not None:
        return
    from mixquant.kernels.few_rows_triton import few_rows

    weight = torch.zeros(256, 256, dtype=torch.bfloat16, device=device)
    x = torch.zeros(1, 256, dtype=torch.bfloat16, device=device)
    for programs in (PROGRAMS, _multiprocessors()):
        few_rows(x, weight, torch.empty_like(x), programs)


@functools.cache
def _multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


@functools.cache
def _side(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]:
    """A stream of its own, and two events that are recorded anew in each layer."""
    return torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event()
