"""The arithmetic of one linear layer under a phase plan: quantized rows here, precise rows there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.core.phase import PhasePlan, Range
from mixquant.formats import BY_NAME, Kernel, QuantizedWeight


@dataclass(frozen=True)
class Part:
    """Consecutive output features of a layer that share a format.

    An ordinary layer has one part; one that is fused out of several projections has one for each.
    ``weight`` is None for a part that is precise in both phases. ``options`` go to the format's
    quantizer of activation rows.
    """

    features: Range
    format: str
    weight: QuantizedWeight | None
    options: dict[str, Any] = field(default_factory=dict)


def phase_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Part, ...], plan: PhasePlan | None
) -> Tensor:
    """``x @ weight.T + bias``, each row in the precision that the plan gives it.

    Args:
        x: ``[..., K]``; its rows, flattened, are those of the plan. If their number is another, or
            there is no plan, every row is precise.
        weight: ``[N, K]``, the precise weight.
        bias: ``[N]`` or None.
        parts: what the quantized rows are multiplied with; together they cover the N features.

    Returns:
        ``[..., N]`` in the type of ``x``. Padding rows are zero if any row is quantized.
    """
    rows = x.numel() // x.shape[-1]
    if plan is None or plan.rows != rows or not plan.quantized:
        return F.linear(x, weight, bias)

    def quantized(out: Tensor) -> None:
        for part in parts:
            first, last = part.features
            part_bias = None if bias is None else bias[first:last]
            if part.weight is None:
                some = select(x.reshape(rows, -1), plan, "quantized")
                out[:, first:last] = F.linear(some, weight[first:last], part_bias)
            else:
                codes = quantize_once(x, plan, part.format, part.weight.kernel, part.options)
                BY_NAME[part.format].linear(codes, part.weight, part_bias, out[:, first:last])

    return by_phase(x, weight.shape[0], plan, lambda some: F.linear(some, weight, bias), quantized)


def by_phase(
    x: Tensor,
    features: int,
    plan: PhasePlan,
    precise: Callable[[Tensor], Tensor],
    quantized: Callable[[Tensor], None],
) -> Tensor:
    """A function of rows that is computed in one way for precise rows, in another for quantized ones.

    Args:
        x: ``[..., K]``, as many rows as the plan has.
        features: of the result.
        precise: from the precise rows ``[M, K]`` to their results ``[M, features]``.
        quantized: writes the results of the quantized rows into the tensor that it is given.

    Returns:
        ``[..., features]`` in the type of ``x``. Padding rows are zero.
    """
    flat = x.reshape(plan.rows, x.shape[-1])
    out = flat.new_empty(plan.rows, features)
    if plan.quantized_rows + plan.precise_rows < plan.rows:
        out.zero_()
    if plan.precise:
        put(precise(select(flat, plan, "precise")), out, plan, "precise")
    if len(plan.quantized) == 1:
        start, stop = plan.quantized[0]
        quantized(out[start:stop])
    else:
        gathered = flat.new_empty(plan.quantized_rows, features)
        quantized(gathered)
        put(gathered, out, plan, "quantized")
    return out.reshape(*x.shape[:-1], features)


def quantize_once(
    x: Tensor, plan: PhasePlan, fmt: str, kernel: Kernel, options: Mapping[str, Any]
) -> Any:
    """The quantized rows of ``x``, which the next layer may read as well (q, k and v, say)."""
    key = _rows_key(fmt, kernel, options)
    if key in plan.encoded:
        of, version, rows = plan.encoded[key]
        if of is x and version == x._version:
            return rows
    some = select(x.reshape(plan.rows, x.shape[-1]), plan, "quantized")
    rows = BY_NAME[fmt].quantize_rows(some, kernel, **options)
    remember_quantized(x, plan, fmt, kernel, rows, options)
    return rows


def remember_quantized(
    x: Tensor,
    plan: PhasePlan,
    fmt: str,
    kernel: Kernel,
    rows: Any,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Keeps the quantized rows of ``x`` for `quantize_once`, in place of those before.

    A tensor that was written to since is another activation; an inference tensor does not tell
    whether it was, so its rows are not kept.
    """
    if not x.is_inference():
        plan.encoded[_rows_key(fmt, kernel, options)] = (x, x._version, rows)


def _rows_key(fmt: str, kernel: Kernel, options: Mapping[str, Any]) -> tuple[Any, ...]:
    return (fmt, kernel, *sorted(options.items()))


def select(flat: Tensor, plan: PhasePlan, group: str) -> Tensor:
    """The rows of a group; a view if they are consecutive."""
    ranges: tuple[Range, ...] = getattr(plan, group)
    if len(ranges) == 1:
        return flat[ranges[0][0] : ranges[0][1]]
    return flat.index_select(0, index_of(plan, group, flat.device))


def put(rows: Tensor, out: Tensor, plan: PhasePlan, group: str) -> None:
    """Writes the rows of a group to their places in ``out``."""
    ranges: tuple[Range, ...] = getattr(plan, group)
    if len(ranges) == 1:
        out[ranges[0][0] : ranges[0][1]] = rows
    else:
        out.index_copy_(0, index_of(plan, group, out.device), rows)


def index_of(plan: PhasePlan, group: str, device: torch.device) -> Tensor:
    """The numbers of the rows of a group, int64."""
    key = (group, device)
    if key not in plan.index:
        ranges: tuple[Range, ...] = getattr(plan, group)
        rows = torch.from_numpy(np.concatenate([np.arange(*piece) for piece in ranges]))
        if device.type == "cuda":
            # Pinned, and a new buffer for each plan, so that the copy need not be waited for.
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=device.type == "cuda")
        plan.index[key] = rows
    return plan.index[key]
