"""Linear layers on Hopper whose copies are FP8 as a whole, in as few launches as it takes.

What stands in front of a layer in the model, RMSNorm or SiLU-and-multiply, may be left to it
(`mixquant.engines.vllm.patches.fusion`): quantized rows are then normalized, or activated, by the
kernel that quantizes them.

The few precise rows of a pass whose other rows are quantized (last tokens of prompts, decode rows) read
the whole BF16 weight for a handful of rows: a kernel of ours (`mixquant.kernels.triton.few_rows`) takes
them out of the input, or from where the quantizing kernel has put them, and writes their products over
the quantized ones. To have it run beside those, on a stream of its own and a few multiprocessors,
gained nothing that could be measured (docs/performance.md).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, plan_pass
from mixquant.core.rows import index_of
from mixquant.engines.vllm.products.choose import ScaledProduct

MOST_ROWS = 16  # that count as few


@functools.cache
def why_not() -> str | None:
    """Why this machine has no such layers, or None if it has."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    return None


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
        self.few = 0 < count <= MOST_ROWS
        # Padding is read by nobody, but must not be what lay in this memory.
        some = last - first < 0.9 * plan.rows and not padded
        # cuBLASLt needs scales at multiples of 16 bytes.
        self.quantized = (first - first % 4, last) if some else (0, plan.rows)
        self._places: Tensor | None = None
        self._rooms: dict[tuple[int, bool], tuple[Any, tuple[Tensor, Tensor]]] = {}

    def room(
        self, width: int, with_precise: bool, device: torch.device
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Room for the codes of all rows, and what of it is multiplied: one for all layers.

        Layers follow each other on one stream, so the next one's codes may take the place of the last
        one's.

        Args:
            with_precise: whether the precise rows are put apart as they are quantized.
        """
        found = self._rooms.get((width, with_precise))
        if found is None:
            from mixquant.kernels.triton.fused import room_for

            room = room_for("fp8", self.rows, width, device)
            if with_precise and self.index is not None:
                precise = torch.empty(len(self.index), width, dtype=torch.bfloat16, device=device)
                room = replace(room, precise=precise, places=self._places_on(device))
            rows = slice(*self.quantized)
            found = room, (room.codes[rows], room.scale[rows])
            self._rooms[width, with_precise] = found
        return found

    def _places_on(self, device: torch.device) -> Tensor:
        """Which of the precise rows each row is, int32, or -1."""
        if self._places is None:
            assert self.index is not None
            places = torch.full((self.rows,), -1, dtype=torch.int32, device=device)
            numbers = torch.arange(len(self.index), dtype=torch.int32, device=device)
            self._places = places.index_copy_(0, self.index, numbers)
        return self._places


def route_of(plan: PhasePlan, device: torch.device) -> Route:
    found: Route | None = plan.memo.get("route")
    if found is None:
        found = plan.memo["route"] = Route(plan, device)
    return found


class Fp8Layer:
    """The BF16 weight ``[N, K]`` of a layer, and its copy.

    Attributes:
        norm: weight ``[K]`` and epsilon of an RMSNorm that is left to the layer, or None.
        activated: whether a SiLU-and-multiply is.
    """

    weight: Tensor
    product: ScaledProduct

    def __init__(self, shape: tuple[int, int]) -> None:
        self.features, self.width = shape
        self.norm: tuple[Tensor, float] | None = None
        self.activated = False

    def hold(self, weight: Tensor, product: ScaledProduct) -> None:
        """Takes the weights, which may have been loaded anew; of BF16, nothing may be left."""
        self.weight = weight.data.as_subclass(Tensor)  # vLLM's parameters are slow to look at
        self.product = product

    def precise_input(self, x: Tensor, residual: Tensor | None, total: Tensor | None) -> Tensor:
        """What the weight is multiplied with; ``residual`` and ``total`` as of `multiply`."""
        from mixquant.kernels.triton.fused import precise_rms_norm, precise_silu_and_mul

        if self.norm is not None:
            return precise_rms_norm(x, residual, *self.norm, total)
        return precise_silu_and_mul(x) if self.activated else x

    def multiplied(
        self, x: Tensor, residual: Tensor | None, route: Route, total: Tensor | None
    ) -> Tensor:
        """The products ``[M, N]`` of all rows."""
        from mixquant.kernels.triton.fused import rms_norm, silu_and_mul

        out = x.new_empty(route.rows, self.features)
        plain = self.norm is None and not self.activated
        room, codes = route.room(self.width, not plain, x.device)
        if self.norm is not None:
            rms_norm(x, residual, *self.norm, room, total)
        elif self.activated:
            silu_and_mul(x, room)
        else:  # not by vLLM's Python wrapper, which takes as long as the operator
            torch.ops._C.dynamic_per_token_scaled_fp8_quant(room.codes, x, room.scale, None)
        start, stop = route.quantized
        self.product.multiply(codes, None, out if stop - start == route.rows else out[start:stop])
        if route.index is not None:
            self._precise(x if plain else room.precise, route.index if plain else None, route, out)
        return out

    def _precise(self, x: Tensor, rows: Tensor | None, route: Route, out: Tensor) -> None:
        """Multiplies the precise rows, these of ``x`` or all of it, and writes them over the others."""
        from mixquant.kernels.triton.few_rows import few_rows

        assert route.index is not None
        if route.few:
            few_rows(x, self.weight, out, rows, route.index)
        else:
            x = x if rows is None else x.index_select(0, rows)
            out.index_copy_(0, route.index, F.linear(x, self.weight))


def multiply(
    layers: Sequence[Fp8Layer],
    x: Tensor,
    residual: Tensor | None,
    plan: PhasePlan,
    total: Tensor | None,
) -> Tensor:
    """The output ``[M, N]`` of layers that follow each other.

    Args:
        x: the first one's input ``[M, K]``, ``[M, 2 K]`` if it is activated there.
        residual: ``[M, K]`` or None: what is added to the input before it is normalized there.
        total: where that sum is written, if it is one.
    """
    route = route_of(plan, x.device)
    for layer in layers:
        x = layer.multiplied(x, residual, route, total)
        residual = total = None
    return x


def warm_up(layers: Iterable[Fp8Layer], device: torch.device) -> None:
    """Has the kernels compiled that the layers launch, before the first request waits for them."""
    rows = 32
    tail = plan_pass(Thresholds(precise_tail=1), [0], [rows], [rows])
    seen = set()
    for layer in layers:
        kind = layer.features, layer.width, layer.norm is not None, layer.activated
        if kind in seen:
            continue
        seen.add(kind)
        wide = 2 * layer.width if layer.activated else layer.width
        x = torch.zeros(rows, wide, dtype=torch.bfloat16, device=device)
        # In front of a model's first layer there is no sum.
        for residual in (None, torch.zeros_like(x)) if layer.norm is not None else (None,):
            total = None if residual is None else torch.empty_like(residual)
            layer.multiplied(x, residual, Route(everything_quantized(rows), device), total)
            if layer.weight.numel():  # a prefill engine has no precise rows
                layer.multiplied(x, residual, Route(tail, device), total)
                layer.precise_input(x, residual, total)
