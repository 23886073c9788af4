"""The method of a linear layer in vLLM: BF16 weights, a quantized copy, and a choice per row."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from mixquant.engines.vllm.memory import Ledger
from mixquant.engines.vllm.products import (
    Product,
    nbytes_of,
    product_of,
    product_of_tensors,
    why_not,
)
from mixquant.engines.vllm.second_checkpoint import joined, opened, shard
from mixquant.linear import put, select
from mixquant.phase import PhasePlan, Range, plan_in_force
from mixquant.recipe import FUSED_PROJECTIONS, Recipe
from mixquant.summary import IGNORED, Layer

# Formats from the most precise to the least: what a fused layer takes whose parts are not known.
_PRECISION = ("bf16", "fp8", "int8", "nvfp4")

_ADVICE = (
    "name layers in the recipe's 'ignore', take format nvfp4 where the GPU has it (its copy is little "
    "more than a quarter of the weights, fp8's half), spread the model with --tensor-parallel-size, "
    "or serve without a copy (preset exact)"
)

Layout = tuple[tuple[Range, str, str], ...]  # output features, format, label, per part


class PhaseLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Loads and keeps the BF16 weight as vLLM does, and adds the copy for quantized rows.

    The choice between them is made in one opaque operator, at run time: torch.compile does not see
    it, so one compiled graph serves every plan.
    """

    # The copy is made from the weight as it was loaded; a processed one may be packed.
    supports_pre_processed_weights = False

    def __init__(
        self,
        recipe: Recipe,
        prefix: str,
        packed_modules: Mapping[str, Sequence[str]],
        ledger: Ledger,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.ledger = ledger
        self.prefix = prefix
        members = packed_modules.get(prefix.rpartition(".")[2])
        self.members = tuple(members) if members else None
        self.layout: Layout = ()
        self.sizes: dict[str, int] = {}  # output features by projection, of a fused layer
        self.products: tuple[tuple[Range, Product | None], ...] = ()
        self.why: str | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.shape = (sum(output_partition_sizes), input_size_per_partition)
        self.layout = self._layout(output_partition_sizes)
        copy = sum(
            nbytes_of(fmt, stop - start, self.shape[1])
            for (start, stop), fmt, _ in self.layout
            if fmt != "bf16"
        )
        weight: Any = layer.weight
        self.ledger.reserve(weight.device, self.prefix, copy, weight.nbytes, _ADVICE)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # Before super's: it may pack the weight and leave nothing behind.
        with torch.no_grad():
            self.products = tuple((part[0], self._product(layer, part)) for part in self.layout)
        super().process_weights_after_loading(layer)
        if any(product is not None for _, product in self.products):
            layer.mixquant_method = self
            if not hasattr(layer, "mixquant_number"):  # loaded for the first time
                number = next(_numbers)
                layer.mixquant_number = torch.tensor(number, device="cpu")
                _layers[number] = layer

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.products or not hasattr(layer, "mixquant_number"):
            return super().apply(layer, x, bias)
        return torch.ops.mixquant.phase_linear(x, bias, layer.mixquant_number, self.shape[0])

    def precise(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """vLLM's own product with the BF16 weight."""
        return super().apply(layer, x, bias)

    def described(self, name: str) -> list[Layer]:
        """The layer's lines in the table, one for each part."""
        lines = []
        products = dict(self.products)
        for features, _, label in self.layout:
            product = products.get(features)
            lines.append(
                Layer(
                    name=f"{name}.{label}" if label and len(self.layout) > 1 else name,
                    shape=(features[1] - features[0], self.shape[1]),
                    format=product.format if product else "bf16",
                    kernel=product.kernel.name if product else "vLLM",
                    native=product.kernel.native if product else True,
                    nbytes=product.nbytes if product else 0,
                    why_precise=None if product else self.why,
                )
            )
        return lines

    def _product(self, layer: Any, part: tuple[Range, str, str]) -> Product | None:
        (start, stop), fmt, label = part
        if fmt == "bf16":
            return None
        if self.recipe.prefill_model is None:
            return product_of(fmt, layer.weight.data[start:stop], self.recipe)
        source = opened(self.recipe.prefill_model)
        labels = label.split("+")
        shards = [
            shard(source.layer(self._name(name)), layer, name, rows, self.shape[1])
            for name, rows in zip(labels, self._sizes_of(labels, stop - start), strict=True)
        ]
        return product_of_tensors(joined(shards), layer.weight.device)

    def _name(self, label: str) -> str:
        """The full name of the projection of this label; of the layer itself if it has none."""
        path = self.prefix.rpartition(".")[0]
        return f"{path}.{label}" if label and path else label or self.prefix

    def _sizes_of(self, labels: Sequence[str], whole: int) -> list[int]:
        return [whole] if labels == [""] else [self.sizes[label] for label in labels]

    def _layout(self, sizes: Sequence[int]) -> Layout:
        """Which output features are in which format; parts of one format that touch are one."""
        recipe, prefix = self.recipe, self.prefix
        last = prefix.rpartition(".")[2]
        whole = (0, sum(sizes))
        if recipe.ignores(prefix):
            self.why = IGNORED
            return ((whole, "bf16", ""),)
        if last == "conv1d":
            self.why = "a convolution"
            return ((whole, "bf16", ""),)
        if last == "kv_b_proj":
            # Latent attention reads keys back from the cache through it, rows of no pass.
            self.why = "its rows are not the pass's"
            return ((whole, "bf16", ""),)

        labels = self.members or FUSED_PROJECTIONS.get(last) or ()
        formats = self._formats(labels)
        if formats is None:
            pieces = [(whole, self._format(), "")]
        elif len(formats) == len(sizes):
            ends = [0, *accumulate(sizes)]
            self.sizes = dict(zip(labels, sizes, strict=True))
            pieces = list(zip(pairwise(ends), formats, labels, strict=True))
        else:
            # Where the projections lie is not known: the whole as precise as its most precise one.
            pieces = [(whole, min(formats, key=_PRECISION.index), "")]

        layout: list[tuple[Range, str, str]] = []
        for (start, stop), fmt, label in pieces:
            if layout and layout[-1][1] == fmt and self._may_join(layout[-1][2], label):
                (first, _), _, before = layout.pop()
                layout.append(((first, stop), fmt, f"{before}+{label}"))
            else:
                layout.append(((start, stop), fmt, label))
        return tuple(self._possible(part) for part in layout)

    def _formats(self, labels: Sequence[str]) -> tuple[str, ...] | None:
        """The formats of the projections that the layer is fused from, or None if it is not."""
        if not labels:
            return None
        formats = self.recipe.formats_of_fused(self.prefix, labels)
        if formats is None or self.recipe.prefill_model is None:
            return formats
        source = opened(self.recipe.prefill_model)
        there = [source.format_of(self._name(label)) for label in labels]
        if not any(there) and source.format_of(self.prefix) is not None:
            return None  # fused in the checkpoint, too
        ignored = [self.recipe.ignores(self._name(label)) for label in labels]
        return tuple(
            "bf16" if skip or fmt is None else fmt for skip, fmt in zip(ignored, there, strict=True)
        )

    def _format(self) -> str:
        if self.recipe.prefill_model is None:
            return self.recipe.format_of(self.prefix)
        return opened(self.recipe.prefill_model).format_of(self.prefix) or "bf16"

    def _may_join(self, before: str, label: str) -> bool:
        if self.recipe.prefill_model is None:
            return True
        source = opened(self.recipe.prefill_model)
        names = self._name(before.split("+")[-1]), self._name(label)
        return None in map(source.format_of, names) or source.have_one_scale(*names)

    def _possible(self, part: tuple[Range, str, str]) -> tuple[Range, str, str]:
        (start, stop), fmt, label = part
        if fmt == "bf16":
            self.why = self.why or "the recipe"
            return part
        reason = why_not(fmt, stop - start, self.shape[1])
        if reason is None:
            return part
        self.why = f"{fmt} cannot hold it: {reason}"
        return ((start, stop), "bf16", label)


# A layer is known to the operator by a number in a CPU tensor: a name, or a plain integer, would be
# a constant of the compiled graph, and every layer would be compiled by itself.
_layers: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _phase_linear(x: Tensor, bias: Tensor | None, number: Tensor, features: int) -> Tensor:
    layer: Any = _layers[int(number)]
    method: PhaseLinearMethod = layer.mixquant_method
    plan = plan_in_force()
    rows = x.numel() // x.shape[-1]
    if plan is None or plan.rows != rows or not plan.quantized:
        return method.precise(layer, x, bias)
    flat = x.reshape(rows, x.shape[-1])
    out = flat.new_empty(rows, features)
    _quantized(flat, bias, layer, method, plan, out)
    if plan.precise:
        put(method.precise(layer, select(flat, plan, "precise"), bias), out, plan, "precise")
    return out.view(*x.shape[:-1], features)


def _quantized(
    flat: Tensor,
    bias: Tensor | None,
    layer: Any,
    method: PhaseLinearMethod,
    plan: PhasePlan,
    out: Tensor,
) -> None:
    """Writes the products of the quantized rows; other rows' may be written as well."""
    for_vllm = bias
    if bias is not None:
        bias = bias.to(flat.dtype)  # the CPU backend may have made it FP32 for its own kernels
    first, last = plan.quantized[0][0], plan.quantized[-1][1]
    span = last - first
    if plan.quantized_rows + plan.precise_rows < plan.rows:
        out.zero_()  # padding is read by nobody, but must not be what lay in this memory
    # Few precise rows in between are computed twice rather than all the others gathered.
    together = plan.quantized_rows >= 0.9 * span
    rows = flat[first:last] if together else select(flat, plan, "quantized")
    target = out[first:last] if together else out.new_empty(len(rows), out.shape[1])
    for (start, stop), product in method.products:
        part_bias = None if bias is None else bias[start:stop]
        if product is not None:
            product(rows, part_bias, target[:, start:stop])
        elif layer.weight.numel():
            target[:, start:stop] = F.linear(rows, layer.weight[start:stop], part_bias)
        else:  # the CPU backend has packed the weight, and packed ones have no parts
            target[:, start:stop] = method.precise(layer, rows, for_vllm)[:, start:stop]
    if not together:
        put(target, out, plan, "quantized")


def _fake(x: Tensor, bias: Tensor | None, number: Tensor, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


_library = torch.library.Library("mixquant", "FRAGMENT")
_library.define("phase_linear(Tensor x, Tensor? bias, Tensor number, SymInt features) -> Tensor")
_library.impl("phase_linear", _phase_linear, "CompositeExplicitAutograd")
torch.library.register_fake("mixquant::phase_linear", _fake, lib=_library)
