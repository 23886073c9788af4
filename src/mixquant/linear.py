"""The arithmetic of one linear layer under a phase plan: quantized rows here, precise rows there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.formats import BY_NAME, QuantizedWeight
from mixquant.phase import PhasePlan, Range


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
        ``[..., N]`` in the type of ``x``. Padding rows are zero.
    """
    rows = x.numel() // x.shape[-1]
    if plan is None or plan.rows != rows or not plan.quantized:
        return F.linear(x, weight, bias)

    flat = x.reshape(rows, x.shape[-1])
    out = flat.new_empty(rows, weight.shape[0])
    if plan.quantized_rows + plan.precise_rows < rows:
        out.zero_()
    if plan.precise:
        some = _select(flat, plan, "precise")
        _put(F.linear(some, weight, bias), out, plan, "precise")

    if len(plan.quantized) == 1:
        start, stop = plan.quantized[0]
        _quantized_product(x, flat, weight, bias, parts, plan, out[start:stop])
    else:
        gathered = flat.new_empty(plan.quantized_rows, weight.shape[0])
        _quantized_product(x, flat, weight, bias, parts, plan, gathered)
        _put(gathered, out, plan, "quantized")
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _quantized_product(
    x: Tensor,
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: tuple[Part, ...],
    plan: PhasePlan,
    out: Tensor,
) -> None:
    for part in parts:
        first, last = part.features
        part_bias = None if bias is None else bias[first:last]
        if part.weight is None:
            some = _select(flat, plan, "quantized")
            out[:, first:last] = F.linear(some, weight[first:last], part_bias)
        else:
            quantized = _quantize_once(x, flat, part, part.weight, plan)
            BY_NAME[part.format].linear(quantized, part.weight, part_bias, out[:, first:last])


def _quantize_once(
    x: Tensor, flat: Tensor, part: Part, weight: QuantizedWeight, plan: PhasePlan
) -> Any:
    """The quantized rows of ``x``, which the next layer may read as well (q, k and v, say).

    Only the latest activation is kept. A tensor that was written to since is another activation;
    an inference tensor does not tell, so it is quantized each time.
    """
    tracked = not x.is_inference()
    key = ("quantized rows", part.format, weight.kernel)
    if tracked and key in plan.memo:
        of, version, quantized = plan.memo[key]
        if of is x and version == x._version:
            return quantized
    some = _select(flat, plan, "quantized")
    quantized = BY_NAME[part.format].quantize_rows(some, weight.kernel, **part.options)
    if tracked:
        plan.memo[key] = (x, x._version, quantized)
    return quantized


def _select(flat: Tensor, plan: PhasePlan, group: str) -> Tensor:
    """The rows of a group; a view if they are consecutive."""
    ranges: tuple[Range, ...] = getattr(plan, group)
    if len(ranges) == 1:
        return flat[ranges[0][0] : ranges[0][1]]
    return flat.index_select(0, _index(plan, group, flat.device))


def _put(rows: Tensor, out: Tensor, plan: PhasePlan, group: str) -> None:
    ranges: tuple[Range, ...] = getattr(plan, group)
    if len(ranges) == 1:
        out[ranges[0][0] : ranges[0][1]] = rows
    else:
        out.index_copy_(0, _index(plan, group, out.device), rows)


def _index(plan: PhasePlan, group: str, device: torch.device) -> Tensor:
    key = ("index", group, device)
    if key not in plan.memo:
        ranges: tuple[Range, ...] = getattr(plan, group)
        rows = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        plan.memo[key] = rows.to(device)
    index: Tensor = plan.memo[key]
    return index
