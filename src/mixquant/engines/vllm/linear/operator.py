"""The operator that multiplies a linear layer's rows: opaque to torch.compile, it looks at the plan."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mixquant.core.phase import PhasePlan, Range, everything_quantized, plan_in_force
from mixquant.core.rows import put, select
from mixquant.engines.vllm.context import state_of
from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer, multiply
from mixquant.engines.vllm.products.base import Product

# A layer is known to the operator by a number in a tensor: a name, or a plain integer, would be a
# constant of the compiled graph, and every layer would be compiled by itself. The tensor is on the
# layer's device: what an operator makes that is given a CPU tensor, torch.compile takes for unaligned
# (torch._inductor.ir.FallbackKernel), and its kernels read it more slowly. So that no operator waits for
# the GPU, the number is looked up by the tensor's address; a copy of the tensor is read.
_layers: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_at: dict[int, int] = {}
_numbers = itertools.count()


class LinearMethod(Protocol):
    """What the operator needs of a layer's method (`PhaseLinearMethod`)."""

    only_quantized: bool
    fp8: Fp8Layer | None
    following: Any
    products: tuple[tuple[Range, Product | None], ...]

    def precise(
        self,
        layer: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        total: Tensor | None = None,
    ) -> Tensor: ...

    def input_of(self, flat: Tensor) -> Tensor: ...

    def encoded(self, rows: Tensor, product: Product) -> Any: ...


def number(layer: Any) -> None:
    """Makes a layer known to the operator, by ``layer.mixquant_number``, unless it is already."""
    if not hasattr(layer, "mixquant_number"):
        chosen = next(_numbers)
        layer.mixquant_number = torch.tensor(chosen, device=layer.weight.device)
        _layers[chosen] = layer
        _at[layer.mixquant_number.data_ptr()] = chosen


def _layer_of(number: Tensor) -> Any:
    known = _at.get(number.data_ptr())
    layer = None if known is None else _layers.get(known)
    # An address may have been another's: a layer that is gone, of which this tensor is none.
    return layer if layer is not None else _layers[int(number)]


def _plan_of(method: LinearMethod, rows: int) -> PhasePlan | None:
    """The plan in force, if a layer's rows are its rows and any of them is quantized."""
    plan = plan_in_force()
    if method.only_quantized and (plan is None or plan.rows != rows or plan.precise):
        return everything_quantized(rows)
    return plan if plan is not None and plan.rows == rows and plan.quantized else None


def _phase_linear(x: Tensor, bias: Tensor | None, number: Tensor, features: int) -> Tensor:
    layer: Any = _layer_of(number)
    method: LinearMethod = layer.mixquant_method
    rows = x.numel() // x.shape[-1]
    if rows == 0:  # an empty pass; a prefill engine has no BF16 weight for it
        return x.new_empty(*x.shape[:-1], features)
    plan = _plan_of(method, rows)
    if plan is None:
        return method.precise(layer, x, bias)
    # Views are avoided where they change nothing: passes of few thousand rows take the GPU as long as
    # they take the CPU to launch.
    flat = x if x.ndim == 2 else x.reshape(rows, x.shape[-1])
    if method.fp8 is not None and bias is None:
        out = multiply([method.fp8], flat.contiguous(), None, plan, None)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], features)
    out = flat.new_empty(rows, features)
    _quantized(flat, bias, layer, method, plan, out)
    if x.is_cuda and bias is None and len(plan.precise) == 1 and layer.weight.numel():
        start, stop = plan.precise[0]
        weight = layer.weight.t()
        torch.mm(method.input_of(flat[start:stop]), weight, out=out[start:stop])  # no copy
    elif plan.precise:
        put(method.precise(layer, select(flat, plan, "precise"), bias), out, plan, "precise")
    return out if x.ndim == 2 else out.view(*x.shape[:-1], features)


def _phase_add_norm_linear(
    x: Tensor, residual: Tensor, number: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    """The same of ``x + residual``, normalized, through the layer behind it as well; and that sum."""
    layer: Any = _layer_of(number)
    method: LinearMethod = layer.mixquant_method
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return x.new_empty(*x.shape[:-1], features), torch.empty_like(residual)
    plan = _plan_of(method, rows)
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    flat, added, into = x, residual, total
    if x.ndim != 2:
        flat, added, into = (one.reshape(rows, width) for one in (x, residual, total))
    methods = [(layer, method)]
    if method.following is not None:
        methods.append((method.following, method.following.mixquant_method))
    if plan is not None:
        layers = [one.fp8 for _, one in methods if one.fp8 is not None]
        out = multiply(layers, flat.contiguous(), added.contiguous(), plan, into)
    else:
        out = method.precise(layer, flat.contiguous(), None, added.contiguous(), into)
        for next_layer, next_method in methods[1:]:
            out = next_method.precise(next_layer, out, None)
    return (out if x.ndim == 2 else out.view(*x.shape[:-1], features)), total


def _quantized(
    flat: Tensor,
    bias: Tensor | None,
    layer: Any,
    method: LinearMethod,
    plan: PhasePlan,
    out: Tensor,
) -> None:
    """Writes the products of the quantized rows; other rows' may be written as well."""
    for_vllm = bias
    if bias is not None:
        bias = bias.to(flat.dtype)  # the CPU backend may have made it FP32 for its own kernels
    block = state_of(plan).block
    if block == (0, plan.rows):
        rows, target = flat, out
    else:
        if plan.quantized_rows + plan.precise_rows < plan.rows:
            out.zero_()  # padding is read by nobody, but must not be what lay in this memory
        rows = flat[slice(*block)] if block else select(flat, plan, "quantized")
        target = out[slice(*block)] if block else out.new_empty(len(rows), out.shape[1])
    encoded: dict[str, Any] = {}  # by format, for parts that share one
    for (start, stop), product in method.products:
        part_bias = None if bias is None else bias[start:stop]
        if product is not None:
            if product.format not in encoded:
                encoded[product.format] = method.encoded(rows, product)
            columns = target if len(method.products) == 1 else target[:, start:stop]
            product.multiply(encoded[product.format], part_bias, columns)
        elif layer.weight.numel():
            target[:, start:stop] = F.linear(rows, layer.weight[start:stop], part_bias)
        else:  # the CPU backend has packed the weight, and packed ones have no parts
            target[:, start:stop] = method.precise(layer, rows, for_vllm)[:, start:stop]
    if not block:
        put(target, out, plan, "quantized")


def _fake(x: Tensor, bias: Tensor | None, number: Tensor, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


def _fake_add_norm(
    x: Tensor, residual: Tensor, number: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], features), torch.empty_like(residual)


_library = torch.library.Library("mixquant", "FRAGMENT")
_library.define("phase_linear(Tensor x, Tensor? bias, Tensor number, SymInt features) -> Tensor")
_library.impl("phase_linear", _phase_linear, "CompositeExplicitAutograd")
torch.library.register_fake("mixquant::phase_linear", _fake, lib=_library)
_library.define(
    "phase_add_norm_linear(Tensor x, Tensor residual, Tensor number, SymInt features)"
    " -> (Tensor, Tensor)"
)
_library.impl("phase_add_norm_linear", _phase_add_norm_linear, "CompositeExplicitAutograd")
torch.library.register_fake("mixquant::phase_add_norm_linear", _fake_add_norm, lib=_library)
