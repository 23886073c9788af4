"""Products in NVFP4 on a GPU: in the kernel that vLLM selects, or in ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.products.base import Product
from mixquant.formats import EMULATION, Kernel, nvfp4_blocks

# vLLM's kernels that leave activations as they are, or dequantize: no FP4 product.
_NO_FP4_PRODUCT = ("Marlin", "Humming", "W4A16", "Emulation")


def nvfp4_product(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, dtype: torch.dtype
) -> Product:
    """The product in vLLM's kernel, or in ours where vLLM's would leave activations in BF16."""
    name = type(nvfp4_kernel()).__name__
    ours = (
        not hardware.emulates("nvfp4")
        and any(part in name for part in _NO_FP4_PRODUCT)
        and dtype == torch.bfloat16
        and codes.shape[1] % 16 == 0
        and hardware.triton_has_block_scales()
    )
    if ours:
        return TritonNvfp4Product(codes, block_scales, tensor_scale)
    return Nvfp4Product(codes, block_scales, tensor_scale)


class Nvfp4Product(Product):
    """NVFP4 on a GPU, in the kernel that vLLM selects for it.

    vLLM's kernels take one input scale for all rows, so a row would depend on what scale others
    need. Instead each row is brought into range by a power of two, which BF16 holds exactly, the
    kernel gets a fixed scale, and the power is taken out of the product.
    """

    format = "nvfp4"

    def __init__(self, codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> None:
        k = codes.shape[1] * 2
        self.holder = holder_for_nvfp4(codes, block_scales, tensor_scale.view(1), k)
        self.vllm_kernel = nvfp4_kernel()
        self.vllm_kernel.process_weights_after_loading(self.holder)
        name = type(self.vllm_kernel).__name__.removesuffix("NvFp4LinearKernel")
        native = not any(part in name for part in _NO_FP4_PRODUCT)
        self.kernel = EMULATION if name == "Emulation" else Kernel(f"vLLM {name}", native)
        self.nbytes = sum(tensor.nbytes for tensor in self.holder.parameters())

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows brought into range, and the power of two of each ``[M, 1]``."""
        # BF16 whatever the model's type: FP16 has not the range. vLLM's kernels scale the blocks of
        # rows by 6, also where the recipe says 4/6, which then holds for the weights alone.
        return nvfp4_blocks.scale_rows(rows.to(torch.bfloat16))

    def multiply(self, encoded: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor) -> None:
        scaled, row_scale = encoded
        product = self.vllm_kernel.apply_weights(self.holder, scaled, None)
        product = product * row_scale
        out.copy_(product if bias is None else product + bias)


class TritonNvfp4Product(Product):
    """NVFP4 on a GPU that has it, where vLLM has no kernel for it: our own, in Triton."""

    format = "nvfp4"
    kernel = Kernel("Triton", native=True)

    def __init__(self, codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> None:
        self.codes, self.block_scales = codes, block_scales
        self.tensor_scale = tensor_scale.view(1)
        self.nbytes = codes.nbytes + block_scales.nbytes + self.tensor_scale.nbytes

    def encode(self, rows: Tensor) -> Tensor:
        return rows  # the kernel quantizes them itself

    def multiply(self, encoded: Tensor, bias: Tensor | None, out: Tensor) -> None:
        from mixquant.kernels.triton import nvfp4 as kernel

        kernel.linear(encoded, self.codes, self.block_scales, self.tensor_scale, bias, out)


def nvfp4_codes(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales (linear) and tensor scale of a weight ``[N, K]``."""
    how = recipe.block_scale
    scale = nvfp4_blocks.global_scale(weight.abs().amax().float(), how)
    # In pieces: quantizing needs several times the size of what it quantizes.
    pieces = [nvfp4_blocks.quantize(piece, scale, how) for piece in weight.split(1024)]
    codes, block_scales = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    return codes, block_scales, scale.reciprocal()


def nvfp4_kernel() -> Any:
    """vLLM's kernel for NVFP4 here: what it selects where the hardware has the format.

    Elsewhere vLLM would select one that leaves activations in BF16, so there it is the emulation.
    """
    from vllm.model_executor.kernels import linear

    if not hardware.emulates("nvfp4"):
        return linear.init_nvfp4_linear_kernel()
    return linear.EmulationNvFp4LinearKernel(linear.NvFp4LinearLayerConfig())


def holder_for_nvfp4(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, in_features: int
) -> torch.nn.Module:
    """A weight in NVFP4 with the attributes that vLLM's kernels expect of a layer.

    Args:
        codes: ``[N, K/2]`` uint8, packed.
        block_scales: ``[N, K/16]`` float8_e4m3fn, linear.
        tensor_scale: ``[1]`` FP32: what codes and block scales are multiplied with.
        in_features: K.
    """

    def held(tensor: Tensor) -> Any:
        return torch.nn.Parameter(tensor, requires_grad=False)

    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    layer: Any = torch.nn.Module()
    layer.weight = held(codes)
    layer.weight_scale = held(block_scales)
    layer.weight_global_scale = held(tensor_scale)
    layer.input_global_scale = held(one.clone())
    layer.input_global_scale_inv = held(one.clone())
    layer.alpha = held(tensor_scale.clone())  # the input's scale, one, times the weight's
    layer.output_size_per_partition = len(codes)
    layer.input_size_per_partition = in_features
    layer.logical_widths = [len(codes)]
    layer.params_dtype = torch.bfloat16
    return layer
