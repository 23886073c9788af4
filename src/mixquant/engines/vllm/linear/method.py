"""The method of a linear layer in vLLM: BF16 weights, a quantized copy, and a choice per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from mixquant.checkpoints.prefill import check_is_of
from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.fingerprint import sample
from mixquant.core.phase import Range
from mixquant.core.recipe import Recipe
from mixquant.core.summary import Layer
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.linear import operator
from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer
from mixquant.engines.vllm.linear.layout import OutputSlice, from_checkpoint, lay_out, sibling
from mixquant.engines.vllm.loading.memory import Ledger
from mixquant.engines.vllm.loading.online import (
    CannotReload,
    kept_weight,
    load_in_turn,
    replays_graphs,
    should_process,
    weights_are_made_up,
)
from mixquant.engines.vllm.loading.second_checkpoint import joined, shard
from mixquant.engines.vllm.products.base import Product, nbytes_of
from mixquant.engines.vllm.products.choose import product_of, product_of_tensors
from mixquant.engines.vllm.products.in_torch import PreciseProduct
from mixquant.engines.vllm.products.scaled import ScaledProduct

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

    # Set by patches/norms_and_activations.py.
    activated = False  # the input is SiluAndMul's, which is computed here
    in_norm = False  # the layer is multiplied where the norm in front of it is computed
    following: Any = None  # a layer that is multiplied there, too

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
        self.parts: tuple[OutputSlice, ...] = ()
        self.products: tuple[tuple[Range, Product | None], ...] = ()
        self.only_quantized = False  # nothing is left of the BF16 weight
        self.sample: Tensor | None = None  # of the weight that the copy was made of
        self.captured = False  # by CUDA graphs, which keep the addresses of what they read
        self.made_up = False  # weights that --load-format dummy makes: no checkpoint is of them

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
        self.captured, self.made_up = replays_graphs(), weights_are_made_up()
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
            if not should_process(layer, loaded_before=bool(self.products)):
                return
            self._make_products(layer)
            weight: Any = layer.weight
            layer.weight = torch.nn.Parameter(
                torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False
            )
            if hasattr(layer, "_use_min_latency_gemm"):  # DeepSeek's, which reads the weight itself
                layer._use_min_latency_gemm = False  # type: ignore[assignment]
        else:
            if self._read_by_graphs() and self.recipe.everywhere and not self._takes():
                raise CannotReload(
                    "with the recipe's 'everywhere' captured CUDA graphs read the copies that are "
                    "there: restart the engine to load weights, or start it with --enforce-eager"
                )
            # Before super's: it may pack the weight and leave nothing behind.
            self._make_products(layer)
            super().process_weights_after_loading(layer)
        if any(product is not None for _, product in self.products):
            self._set_fp8_weights(layer)
            layer.mixquant_method = self
            operator.number(layer)

    def renew(self, layer: Any) -> None:
        """Makes the copy again if the weight was written to where it is, which vLLM tells nobody."""
        weight = layer.weight
        if weight.is_meta or not weight.numel() or self.sample is None:
            return
        if not torch.equal(self.sample, sample(weight)):
            self.process_weights_after_loading(layer)

    def _read_by_graphs(self) -> bool:
        """Whether there is a copy that CUDA graphs may have been captured with."""
        return self.captured and any(product is not None for _, product in self.products)

    def _takes(self) -> bool:
        """Whether the copy can be made again where it is."""
        return all(
            product is None or isinstance(product, ScaledProduct) for _, product in self.products
        )

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
        from mixquant.kernels.triton.fused import empty_codes, silu_and_mul

        codes = empty_codes("fp8", len(rows), rows.shape[1] // 2, rows.device)
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
            made = tuple((part.features, self._product(layer, part)) for part in self.parts)
            if self._read_by_graphs() and self._takes():
                for (_, old), (_, new) in zip(self.products, made, strict=True):
                    if isinstance(old, ScaledProduct) and isinstance(new, ScaledProduct):
                        old.take(new)
            else:
                self.products = made
            quantizes = any(product is not None for _, product in self.products)
            if quantizes and not self.only_quantized:
                self.sample = sample(layer.weight).clone()  # type: ignore[arg-type]

    def _set_fp8_weights(self, layer: Any) -> None:
        product = self.products[0][1]
        if (
            hardware.why_no_fp8_layers() is None
            and len(self.products) == 1
            and isinstance(product, ScaledProduct)
            and product.format == "fp8"
            and self.dtype == torch.bfloat16
            and getattr(layer, "bias", None) is None
        ):
            if self.fp8 is None:
                self.fp8 = Fp8Layer(self.shape)
            self.fp8.set_weights(kept_weight(layer), product)

    def _product(self, layer: Any, part: OutputSlice) -> Product | None:
        start, stop = part.features
        if part.format == "bf16":
            return PreciseProduct(layer.weight.data[start:stop]) if self.only_quantized else None
        first = sibling(self.prefix, part.projections[0][0])
        if not from_checkpoint(self.recipe, first, part.format):
            return product_of(part.format, layer.weight.data[start:stop], self.recipe)
        assert self.recipe.prefill_model is not None
        source = opened(self.recipe.prefill_model)
        shards = [
            shard(source.layer(sibling(self.prefix, name)), layer, name, rows, self.shape[1])
            for name, rows in part.projections
        ]
        tensors = joined(shards)
        if not self.made_up:
            check_is_of(tensors, layer.weight.data[start:stop], self.prefix)
        return product_of_tensors(tensors, layer.weight.device, self.dtype, self.recipe.block_scale)
