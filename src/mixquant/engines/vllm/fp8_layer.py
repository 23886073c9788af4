"""A linear layer on Hopper whose copy is FP8 as a whole, in as few launches as it takes.

What stands in front of the layer in the model, RMSNorm or SiLU-and-multiply, may be left to it
(`mixquant.engines.vllm.fusion`): quantized rows are then normalized, or activated, by the kernel that
quantizes them.

The few precise rows of a pass whose other rows are quantized (last tokens of prompts, decode rows) read
the whole BF16 weight for a handful of rows, so their product waits for memory. A kernel of ours
(`mixquant.kernels.few_rows_triton`) takes them: beside the quantized product, on a stream of its own and
on a few multiprocessors, where that product is long enough to hide it; else after it, on all of them.
docs/performance.md has what was measured.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.engines.vllm.products import ScaledProduct
from mixquant.linear import index_of
from mixquant.phase import PhasePlan

MOST_ROWS = 16  # that count as few
LEAST_BESIDE = 1024  # quantized rows
PROGRAMS = 8  # of the kernel for few rows, beside the quantized product


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
            among them; with ``place`` the others are multiplied again, or put into place.
        index: the precise rows, int64, or None if there are none.
        few: whether the kernel for few rows multiplies them.
        beside: whether it does so while the others are multiplied.
        among: whether any of them lies among ``quantized``.
    """

    def __init__(self, plan: PhasePlan, device: torch.device) -> None:
        self.rows = plan.rows
        first, last = plan.quantized[0][0], plan.quantized[-1][1]
        count = plan.precise_rows
        padded = plan.quantized_rows + count < plan.rows
        self.index = index_of(plan, "precise", device) if count else None
        self.few = 0 < count <= MOST_ROWS
        self.beside = self.few and not padded and plan.quantized_rows >= LEAST_BESIDE
        # Rows at the ends are left out where that is not for nothing: a matrix that is whole needs no
        # views. Padding is read by nobody, but must not be what lay in this memory.
        leave_out = self.beside or last - first < 0.9 * plan.rows
        # cuBLASLt needs scales at multiples of 16 bytes.
        start, stop = (first - first % 4, last) if leave_out and not padded else (0, plan.rows)
        self.quantized = start, stop
        self.among = any(a < stop and b > start for a, b in plan.precise)
        self._codes: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def codes(self, width: int, device: torch.device) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Room for the codes of all rows, and what of it is multiplied: one for all layers.

        Layers follow each other on one stream, so the next one's codes may take the place of the last
        one's.
        """
        found = self._codes.get(width)
        if found is None:
            from mixquant.kernels.fused_triton import room_for

            room = room_for("fp8", self.rows, width, device)
            rows = slice(*self.quantized)
            found = self._codes[width] = room, (room.codes[rows], room.scale[rows])
        return found


def route_of(plan: PhasePlan, device: torch.device) -> Route:
    found: Route | None = plan.memo.get("route")
    if found is None:
        found = plan.memo["route"] = Route(plan, device)
    return found


class Fp8Layer:
    """The BF16 weight ``[N, K]`` of a layer, and its copy.

    Attributes:
        norm: vLLM's RMSNorm that is left to the layer, or None.
        activated: whether a SiLU-and-multiply is.
    """

    weight: Tensor
    product: ScaledProduct

    def __init__(self, shape: tuple[int, int]) -> None:
        self.features, self.width = shape
        self.norm: Any = None
        self.activated = False

    def hold(self, weight: Tensor, product: ScaledProduct) -> None:
        """Takes the weights, which may have been loaded anew; of BF16, nothing may be left."""
        self.weight = weight.data.as_subclass(Tensor)  # vLLM's parameters are slow to look at
        self.product = product

    def precise_input(
        self,
        x: Tensor,
        residual: Tensor | None,
        total: Tensor | None,
        rows: Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Tensor:
        """What the weight is multiplied with, of all rows or of some; ``total`` as of `multiply`."""
        from mixquant.kernels.fused_triton import precise_rms_norm, precise_silu_and_mul

        if (norm := self.norm) is not None:
            weight, eps = norm.weight.data, norm.variance_epsilon
            return precise_rms_norm(x, residual, weight, eps, total, rows, stream)
        if self.activated:
            return precise_silu_and_mul(x, rows, stream)
        return x if rows is None else x.index_select(0, rows)

    def quantize(self, x: Tensor, residual: Tensor | None, room: Any, total: Tensor | None) -> None:
        """Writes the codes of all rows of the input; ``total`` as of `multiply`."""
        from mixquant.kernels.fused_triton import rms_norm, silu_and_mul

        if (norm := self.norm) is not None:
            rms_norm(x, residual, norm.weight.data, norm.variance_epsilon, room, total)
        elif self.activated:
            silu_and_mul(x, room)
        else:  # not by vLLM's Python wrapper, which takes as long as the operator
            torch.ops._C.dynamic_per_token_scaled_fp8_quant(room.codes, x, room.scale, None)

    def multiply(
        self, x: Tensor, residual: Tensor | None, plan: PhasePlan, total: Tensor | None
    ) -> Tensor:
        """The layer's output ``[M, N]`` of an input ``[M, K]``, ``[M, 2 K]`` if it is activated here.

        Args:
            residual: ``[M, K]`` or None: what is added to the input before it is normalized here.
            total: where that sum is written, if it is one.
        """
        route = route_of(plan, x.device)
        out = x.new_empty(route.rows, self.features)
        room, codes = route.codes(self.width, x.device)
        on_the_side = self._begin(x, residual, route, out) if route.beside else None
        self.quantize(x, residual, room, total)
        start, stop = route.quantized
        self.product.multiply(codes, None, out if stop - start == route.rows else out[start:stop])
        if on_the_side is not None:
            _side(x.device)[2].wait()
            if route.among:
                assert route.index is not None
                out.index_copy_(0, route.index, on_the_side[1])
        elif route.index is not None:
            self._after(x, residual, route, out)
        return out

    def _begin(
        self, x: Tensor, residual: Tensor | None, route: Route, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Begins to multiply the precise rows on the side.

        Returns:
            What is read and written there, which must not be freed before it is done: rows of the
            input, and products, in ``out`` unless others are written there meanwhile.
        """
        from mixquant.kernels.few_rows_triton import few_rows

        side, begun, done = _side(x.device)
        begun.record()
        side.wait_event(begun)
        rows, of_x = self._few(x, residual, route, side)
        assert route.index is not None
        if route.among:
            products = out.new_empty(route.index.shape[0], self.features)
            few_rows(rows, self.weight, products, PROGRAMS, of_x, None, side)
        else:
            products = out
            few_rows(rows, self.weight, out, PROGRAMS, of_x, route.index, side)
        done.record(side)
        return rows, products

    def _after(self, x: Tensor, residual: Tensor | None, route: Route, out: Tensor) -> None:
        """Multiplies the precise rows, and writes them over the others."""
        from mixquant.kernels.few_rows_triton import few_rows

        assert route.index is not None
        if route.few:
            rows, of_x = self._few(x, residual, route, None)
            few_rows(rows, self.weight, out, _multiprocessors(), of_x, route.index)
        else:
            rows = self.precise_input(x, residual, None, route.index)
            out.index_copy_(0, route.index, F.linear(rows, self.weight))

    def _few(
        self, x: Tensor, residual: Tensor | None, route: Route, stream: torch.cuda.Stream | None
    ) -> tuple[Tensor, Tensor | None]:
        """The precise rows of the input: a matrix, and which of its rows, None if all."""
        if self.norm is None and not self.activated:
            return x, route.index
        return self.precise_input(x, residual, None, route.index, stream), None


def warm_up(device: torch.device) -> None:
    """Has the kernels for few rows compiled before the first request waits for them."""
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
