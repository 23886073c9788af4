"""Linear layers on Hopper whose copies are FP8 as a whole, in as few launches as it takes.

The RMSNorm or SiLU-and-multiply in front of a layer may be left to the layer
(`mixquant.engines.vllm.patches.norms_and_activations`): the kernel that quantizes rows then also
normalizes or activates them.

The few precise rows of a pass whose other rows are quantized (last tokens of prompts, decode rows) read
the whole BF16 weight for a handful of rows: a kernel of ours (`mixquant.kernels.triton.few_rows`) takes
them out of the input, or from where the quantizing kernel has put them, and writes their products over
the quantized ones. To have it run beside those, on a stream of its own and a few multiprocessors,
gained nothing that could be measured (docs/develop/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, plan_pass
from mixquant.engines.vllm.context import state_of
from mixquant.engines.vllm.linear.route import Route
from mixquant.engines.vllm.products.scaled import ScaledProduct


def route_of(plan: PhasePlan, device: torch.device) -> Route:
    """The route of a plan, made by the first layer that asks."""
    state = state_of(plan)
    if state.route is None:
        state.route = Route(plan, device)
    return state.route


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

    def set_weights(self, weight: Tensor, product: ScaledProduct) -> None:
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
        into, codes = route.buffers(self.width, not plain, x.device)
        if self.norm is not None:
            rms_norm(x, residual, *self.norm, into, total)
        elif self.activated:
            silu_and_mul(x, into)
        else:  # not by vLLM's Python wrapper, which takes as long as the operator
            torch.ops._C.dynamic_per_token_scaled_fp8_quant(into.codes, x, into.scale, None)
        start, stop = route.quantized
        self.product.multiply(codes, None, out if stop - start == route.rows else out[start:stop])
        if route.index is not None:
            self._precise(x if plain else into.precise, route.index if plain else None, route, out)
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
