"""What a quantized copy of a layer's experts gives its callers, and how rows are divided for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mixquant.core.phase import PhasePlan
from mixquant.core.rows import put, select

# Of a pass's rows, so many may be precise for it to be cheaper to push all of them through the
# quantized kernel and to overwrite the precise ones than to gather the quantized ones.
_OVERWRITE_UP_TO = 1 / 8


class QuantizedExperts(Protocol):
    """The quantized copy of one layer's experts."""

    kernel: str
    nbytes: int

    def load(self, layer: Any) -> None:
        """Quantizes the layer's BF16 weights into storage that stays where it is."""
        ...

    def take(self, expert: int, gate: Any, up: Any, down: Any) -> None:
        """Puts quantized weights of one expert, of this rank, into that storage instead."""
        ...

    def __call__(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The weighted sums of the experts' outputs, ``[M, K]``, of rows ``[M, K]``.

        ``weights`` and ``ids`` are the router's, ``[M, top-k]``.
        """
        ...


def by_rows(
    plan: PhasePlan,
    of_rows: tuple[Tensor, ...],
    precise: Callable[..., Tensor],
    quantized: Callable[..., Tensor],
) -> Tensor:
    """Both kinds of rows, each through its function, in one tensor.

    Args:
        plan: with at least one quantized row.
        of_rows: what belongs to the rows, ``[rows, ...]`` each; the first are the rows themselves.

    Returns:
        ``[rows, K]``; padding rows are zero, and reach neither function: vLLM routes them nowhere.
    """
    x = of_rows[0]
    real = plan.quantized_rows + plan.precise_rows
    at_the_end = max(stop for _, stop in plan.quantized + plan.precise) == real
    if plan.precise_rows <= _OVERWRITE_UP_TO * plan.rows and at_the_end:
        out = quantized(*(tensor[:real] for tensor in of_rows))
        if real < plan.rows:
            out = torch.cat([out, out.new_zeros(plan.rows - real, out.shape[1])])
    else:
        out = torch.zeros_like(x) if real < plan.rows else torch.empty_like(x)
        put(quantized(*(select(t, plan, "quantized") for t in of_rows)), out, plan, "quantized")
    if plan.precise:
        put(precise(*(select(t, plan, "precise") for t in of_rows)), out, plan, "precise")
    return out
