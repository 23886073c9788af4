"""The method of a linear layer in vLLM: BF16 weights, a quantized copy, and a choice per row."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from mixquant.core.fingerprint import sample
from mixquant.core.phase import PhasePlan, Range, everything_quantized, plan_in_force
from mixquant.core.recipe import Recipe
from mixquant.core.rows import put, select
from mixquant.core.summary import Layer
from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer, multiply
from mixquant.engines.vllm.linear.fp8_layer import why_not as why_no_fp8_layer
from mixquant.engines.vllm.linear.layout import Part, beside, lay_out
from mixquant.engines.vllm.loading.memory import Ledger
from mixquant.engines.vllm.loading.online import (
    CannotReload,
    begins,
    kept_weight,
    load_in_turn,
    replays_graphs,
)
from mixquant.engines.vllm.loading.second_checkpoint import joined, opened, shard
from mixquant.engines.vllm.products.choose import (
    PreciseProduct,
    Product,
    ScaledProduct,
    nbytes_of,
    product_of,
    product_of_tensors,
)

_ADVICE = (
    "name layers in the recipe's 'ignore', take format nvfp4 where the GPU has it (its copy is little "
    "more than a quarter of the weights, fp8's half), spread the model with --tensor-parallel-size, "
    "or serve without a copy (preset exact)"
)
_ADVICE_FOR_PREFILL = (
    "take format nvfp4 where the GPU has it (half of fp8's), or spread the model with "
    "--tensor-parallel-size"
)


class PhaseLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Loads and keeps the BF16 weight as vLLM does, and adds the copy for quantized rows.

    The choice between them is made in one opaque operator, at run time: torch.compile does not see
    it, so one compiled graph serves every plan.

    In a prefill engine the BF16 weight is given back as soon as the copy is made, layer by layer while
    the model loads, and every row is multiplied with the copy.
    """

    # The copy is made from the weight as it was loaded; a processed one may be packed.
    supports_pre_processed_weights = False

    fp8: Fp8Layer | None = None  # what multiplies the layer, where it can

    # See fusion.py: whether the input is SiluAndMul's, which is computed here; whether the layer is
    # multiplied where a norm in front of it is computed; and the layer that is multiplied there, too.
    activated = False
    in_norm = False
    behind: Any = None

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
        self.members = packed_modules.get(prefix.rpartition(".")[2])
        self.parts: tuple[Part, ...] = ()
        self.products: tuple[tuple[Range, Product | None], ...] = ()
        self.only_quantized = False  # nothing is left of the BF16 weight
        self.sample: Tensor | None = None  # of the weight that the copy was made of

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
        self.shape = (sum(output_partition_sizes), input_size_per_partition)
        self.dtype = params_dtype
        self.parts = lay_out(
            self.recipe,
            self.prefix,
            output_partition_sizes,
            input_size_per_partition,
            self.members,
        )
        copy = sum(
            nbytes_of(part.format, part.features[1] - part.features[0], self.shape[1])
            for part in self.parts
            if part.format != "bf16"
        )
        self.only_quantized = self.recipe.role == "prefill" and copy > 0
        device = torch.get_default_device()
        with torch.device("meta") if self.only_quantized else nullcontext():
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
        weight: Any = layer.weight
        if self.only_quantized:
            load_in_turn(self, layer)
            in_bf16 = sum(
                (part.features[1] - part.features[0]) * self.shape[1] * self.dtype.itemsize
                for part in self.parts
                if part.format == "bf16"
            )
            self.ledger.reserve(device, self.prefix, copy + in_bf16, 0, _ADVICE_FOR_PREFILL)
        else:
            self.ledger.reserve(weight.device, self.prefix, copy, weight.nbytes, _ADVICE)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.only_quantized:
            if not begins(layer, loaded_before=bool(self.products)):
                return
            self._make_products(layer)
            weight: Any = layer.weight
            layer.weight = torch.nn.Parameter(
                torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False
            )
            if hasattr(layer, "_use_min_latency_gemm"):  # DeepSeek's, which reads the weight itself
                layer._use_min_latency_gemm = False  # type: ignore[assignment]
        else:
            if self._read_by_graphs():
                raise CannotReload(
                    "with the recipe's 'everywhere' captured CUDA graphs read the copies that are "
                    "there: restart the engine to load weights, or start it with --enforce-eager"
                )
            # Before super's: it may pack the weight and leave nothing behind.
            self._make_products(layer)
            super().process_weights_after_loading(layer)
        if any(product is not None for _, product in self.products):
            self._hold_fp8(layer)
            layer.mixquant_method = self
            if not hasattr(layer, "mixquant_number"):  # loaded for the first time
                number = next(_numbers)
                layer.mixquant_number = torch.tensor(number, device="cpu")
                _layers[number] = layer

    def renew(self, layer: Any) -> None:
        """Makes the copy again if the weight was written to where it is, which vLLM tells nobody."""
        weight = layer.weight
        if weight.is_meta or not weight.numel() or self.sample is None:
            return
        if not torch.equal(self.sample, sample(weight)):
            self.process_weights_after_loading(layer)

    def _read_by_graphs(self) -> bool:
        """Whether there is a copy that CUDA graphs were captured with."""
        held = any(product is not None for _, product in self.products)
        return held and self.recipe.everywhere and replays_graphs()

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.products or not hasattr(layer, "mixquant_number"):
            return super().apply(layer, x, bias)
        if self.in_norm:
            return x
        return torch.ops.mixquant.phase_linear(x, bias, layer.mixquant_number, self.shape[0])

    def precise(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """vLLM's own product with the BF16 weight; ``residual`` and ``total`` as of `Fp8Layer`."""
        if self.activated or self.in_norm:
            flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
            x = self.input_of(flat, residual, total).view(*x.shape[:-1], self.shape[1])
        return super().apply(layer, x, bias)

    def input_of(
        self, flat: Tensor, residual: Tensor | None = None, total: Tensor | None = None
    ) -> Tensor:
        """What the weight is multiplied with, of rows that are precise."""
        if self.fp8 is not None:
            return self.fp8.precise_input(flat, residual, total)
        if not self.activated:
            return flat
        from mixquant.kernels.triton.fused import precise_silu_and_mul

        return precise_silu_and_mul(flat)

    def encoded(self, rows: Tensor, product: Product) -> Any:
        """The quantized rows of the layer's input, as ``product`` takes them."""
        if not self.activated:
            return product.encode(rows)
        from mixquant.kernels.triton.fused import room_for, silu_and_mul

        codes = room_for("fp8", len(rows), rows.shape[1] // 2, rows.device)
        silu_and_mul(rows, codes)
        return codes.codes, codes.scale

    def described(self, name: str) -> list[Layer]:
        """The layer's lines in the table, one for each part."""
        lines = []
        for part, (_, product) in zip(self.parts, self.products, strict=True):
            start, stop = part.features
            lines.append(
                Layer(
                    name=f"{name}.{part.label}" if len(self.parts) > 1 else name,
                    shape=(stop - start, self.shape[1]),
                    format=product.format if product else "bf16",
                    kernel=product.kernel.name if product else "vLLM",
                    native=product.kernel.native if product else True,
                    nbytes=product.nbytes if product else 0,
                    why_precise=part.why_precise,
                    freed=(stop - start) * self.shape[1] * self.dtype.itemsize
                    if self.only_quantized
                    else 0,
                )
            )
        return lines

    def _make_products(self, layer: torch.nn.Module) -> None:
        with torch.no_grad():
            self.sample = sample(layer.weight).clone()  # type: ignore[arg-type]
            self.products = tuple(
                (part.features, self._product(layer, part)) for part in self.parts
            )

    def _hold_fp8(self, layer: Any) -> None:
        product = self.products[0][1]
        if (
            why_no_fp8_layer() is None
            and len(self.products) == 1
            and isinstance(product, ScaledProduct)
            and product.format == "fp8"
            and self.dtype == torch.bfloat16
            and getattr(layer, "bias", None) is None
        ):
            if self.fp8 is None:
                self.fp8 = Fp8Layer(self.shape)
            self.fp8.hold(kept_weight(layer), product)

    def _product(self, layer: Any, part: Part) -> Product | None:
        start, stop = part.features
        if part.format == "bf16":
            return PreciseProduct(layer.weight.data[start:stop]) if self.only_quantized else None
        if self.recipe.prefill_model is None:
            return product_of(part.format, layer.weight.data[start:stop], self.recipe)
        source = opened(self.recipe.prefill_model)
        shards = [
            shard(source.layer(beside(self.prefix, name)), layer, name, rows, self.shape[1])
            for name, rows in part.projections
        ]
        return product_of_tensors(joined(shards), layer.weight.device, self.dtype)


# A layer is known to the operator by a number in a CPU tensor: a name, or a plain integer, would be
# a constant of the compiled graph, and every layer would be compiled by itself.
_layers: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def computed_together(plan: PhasePlan) -> Range | None:
    """A range that holds all quantized rows of a plan that has some, and few others.

    All of it is multiplied with the copy, and the others again as they should be: cheaper than
    gathering the quantized ones. None if the others are too many.
    """
    if "together" not in plan.memo:
        first, last = plan.quantized[0][0], plan.quantized[-1][1]
        many = plan.quantized_rows / 0.9
        padded = plan.quantized_rows + plan.precise_rows < plan.rows
        found = (0, plan.rows) if many >= plan.rows and not padded else (first, last)
        plan.memo["together"] = found if many >= found[1] - found[0] else None
    together: Range | None = plan.memo["together"]
    return together


def _plan_of(method: PhaseLinearMethod, rows: int) -> PhasePlan | None:
    """The plan in force, if a layer's rows are its rows and any of them is quantized."""
    plan = plan_in_force()
    if method.only_quantized and (plan is None or plan.rows != rows or plan.precise):
        return everything_quantized(rows)
    return plan if plan is not None and plan.rows == rows and plan.quantized else None


def _phase_linear(x: Tensor, bias: Tensor | None, number: Tensor, features: int) -> Tensor:
    layer: Any = _layers[int(number)]
    method: PhaseLinearMethod = layer.mixquant_method
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
    layer: Any = _layers[int(number)]
    method: PhaseLinearMethod = layer.mixquant_method
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
    if method.behind is not None:
        methods.append((method.behind, method.behind.mixquant_method))
    if plan is not None:
        layers = [its.fp8 for _, its in methods if its.fp8 is not None]
        out = multiply(layers, flat.contiguous(), added.contiguous(), plan, into)
    else:
        out = method.precise(layer, flat.contiguous(), None, added.contiguous(), into)
        for its_layer, its in methods[1:]:
            out = its.precise(its_layer, out, None)
    return (out if x.ndim == 2 else out.view(*x.shape[:-1], features)), total


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
    together = computed_together(plan)
    if together == (0, plan.rows):
        rows, target = flat, out
    else:
        if plan.quantized_rows + plan.precise_rows < plan.rows:
            out.zero_()  # padding is read by nobody, but must not be what lay in this memory
        rows = flat[slice(*together)] if together else select(flat, plan, "quantized")
        target = out[slice(*together)] if together else out.new_empty(len(rows), out.shape[1])
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
    if not together:
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
