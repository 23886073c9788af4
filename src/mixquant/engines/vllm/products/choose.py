"""Which product a quantized weight gets on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.products.base import Product
from mixquant.engines.vllm.products.cpu import OneDnnProduct
from mixquant.engines.vllm.products.in_torch import EmulatedProduct
from mixquant.engines.vllm.products.nvfp4 import nvfp4_codes, nvfp4_product
from mixquant.engines.vllm.products.scaled import ScaledProduct
from mixquant.formats import EMULATION, nvfp4
from mixquant.formats.fp8 import Fp8Weight
from mixquant.formats.nvfp4_blocks import BlockScale


def product_of(fmt: str, weight: Tensor, recipe: Recipe) -> Product:
    """Quantizes a weight ``[N, K]`` (BF16, FP16 or FP32) for the kernel that vLLM has here."""
    if fmt == "nvfp4":
        if weight.is_cuda:
            return nvfp4_product(*nvfp4_codes(weight, recipe), weight.dtype)
        return EmulatedProduct(fmt, weight, {"block_scale": recipe.block_scale})
    if hardware.emulates(fmt):
        return EmulatedProduct(fmt, weight, {})
    if weight.is_cuda:
        return ScaledProduct(fmt, weight)
    return OneDnnProduct(weight)


def product_of_tensors(
    tensors: Fp8Tensors | Nvfp4Tensors,
    device: torch.device,
    dtype: torch.dtype,
    block_scale: BlockScale,
) -> Product:
    """The same for a weight that a checkpoint holds quantized.

    Args:
        tensors: ``[N, K]``.
        dtype: of the rows.
        block_scale: of rows in emulated NVFP4.
    """
    if isinstance(tensors, Fp8Tensors):
        codes, scale = tensors.codes.to(device), tensors.scale.to(device)
        if device.type == "cuda" and not hardware.emulates("fp8"):
            return ScaledProduct.of_codes(codes, scale)
        weight = Fp8Weight(codes, scale, EMULATION, tensors.shape)
        return EmulatedProduct.of_weight("fp8", weight, {})
    codes, block_scales = tensors.codes.to(device), tensors.block_scales.to(device)
    tensor_scale = tensors.global_scale.to(device).reciprocal()
    if device.type == "cuda":
        return nvfp4_product(codes, block_scales, tensor_scale, dtype)
    emulated = nvfp4.emulated_weight(codes, block_scales, tensor_scale)
    return EmulatedProduct.of_weight("nvfp4", emulated, {"block_scale": block_scale})
