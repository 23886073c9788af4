"""How many rows the passes of a model quantize."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixquant.core.phase import plan_in_force


@contextmanager
def quantized_rows(model: Any) -> Iterator[list[int]]:
    """A list that gets, for each forward pass inside the block, the rows multiplied in a prefill format.

    Only zeros for a model that is not prepared, or whose recipe quantizes no layer.

    Args:
        model: Transformers'.
    """
    # A plan knows rows, not layers: it has quantized rows even where no layer is quantized.
    made = getattr(model, "mixquant_summary", None)
    any_layer = made is not None and made.extra_bytes > 0
    rows: list[int] = []

    def count(*_: Any) -> None:
        plan = plan_in_force()
        rows.append(plan.quantized_rows if plan is not None and any_layer else 0)

    hook = model.get_decoder().register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        hook.remove()
