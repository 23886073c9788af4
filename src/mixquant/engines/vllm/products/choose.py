"""The product of quantized rows with one quantized weight, in the kernels that vLLM has for it."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from mixquant.checkpoints.prefill import Fp8Tensors, Nvfp4Tensors
from mixquant.core.recipe import Recipe
from mixquant.formats import BY_NAME, EMULATION, Kernel
from mixquant.formats import fp8 as fp8_format
from mixquant.formats import int8 as int8_format
from mixquant.formats import nvfp4 as nvfp4_format

CUTLASS = Kernel("vLLM CUTLASS", native=True)
CUBLAS = Kernel("cuBLASLt, CUTLASS", native=True)  # by the number of rows and the output's type
MANY_ROWS = 1024  # from which on cuBLASLt is called
ONEDNN = Kernel("vLLM oneDNN", native=True)


class Product(Protocol):
    """A quantized weight ``[N, K]`` and what multiplies rows with it."""

    format: str
    kernel: Kernel
    nbytes: int

    def encode(self, rows: Tensor) -> Any:
        """Rows ``[M, K]`` as `multiply` takes them, the same for all products of a format here."""
        ...

    def multiply(self, encoded: Any, bias: Tensor | None, out: Tensor) -> None:
        """Writes the products ``[M, N]`` of encoded rows into ``out``.

        ``out`` may be columns of a wider matrix; ``bias`` is ``[N]`` in its type, or None.
        """
        ...

    def __call__(self, rows: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes the products ``[M, N]`` of rows ``[M, K]`` into ``out``, as `multiply` does."""
        self.multiply(self.encode(rows), bias, out)


def why_not(fmt: str, out_features: int, in_features: int) -> str | None:
    """Why this machine's kernel cannot hold a weight of this shape, or None if it can."""
    from vllm.platforms import current_platform

    if fmt == "nvfp4" and in_features % nvfp4_format.BLOCK:
        return f"in_features {in_features} is not a multiple of {nvfp4_format.BLOCK}"
    cutlass = current_platform.is_cuda() and fmt in ("fp8", "int8") and not _emulated(fmt)
    if cutlass and (out_features % 16 or in_features % 16):
        return f"{out_features} x {in_features}: CUTLASS needs multiples of 16"
    return None


# vLLM's kernels that leave activations as they are, or dequantize: no FP4 product.
_NO_FP4_PRODUCT = ("Marlin", "Humming", "W4A16", "Emulation")


def product_of(fmt: str, weight: Tensor, recipe: Recipe) -> Product:
    """Quantizes a weight ``[N, K]`` (BF16, FP16 or FP32) for the kernel that vLLM has here."""
    if fmt == "nvfp4":
        if weight.is_cuda:
            return nvfp4_product(*nvfp4_codes(weight, recipe), weight.dtype)
        return EmulatedProduct(fmt, weight, {"block_scale": recipe.block_scale})
    if _emulated(fmt):
        return EmulatedProduct(fmt, weight, {})
    if weight.is_cuda:
        return ScaledProduct(fmt, weight)
    return OneDnnProduct(weight)


def product_of_tensors(
    tensors: Fp8Tensors | Nvfp4Tensors, device: torch.device, dtype: torch.dtype
) -> Product:
    """The same for a weight that a checkpoint holds quantized; ``dtype`` is the rows'."""
    if isinstance(tensors, Fp8Tensors):
        codes, scale = tensors.codes.to(device), tensors.scale.to(device)
        if device.type == "cuda" and not _emulated("fp8"):
            return ScaledProduct.of_codes(codes, scale)
        weight = fp8_format.Fp8Weight(codes, scale, EMULATION, tensors.shape)
        return EmulatedProduct.of_weight("fp8", weight)
    codes, block_scales = tensors.codes.to(device), tensors.block_scales.to(device)
    tensor_scale = tensors.global_scale.to(device).reciprocal()
    if device.type == "cuda":
        return nvfp4_product(codes, block_scales, tensor_scale, dtype)
    emulated = nvfp4_format.emulated_weight(codes, block_scales, tensor_scale)
    return EmulatedProduct.of_weight("nvfp4", emulated)


def nbytes_of(fmt: str, out_features: int, in_features: int) -> int:
    """How many bytes the copy of a weight takes in a native kernel."""
    elements = out_features * in_features
    if fmt == "nvfp4":
        return elements // 2 + elements // nvfp4_format.BLOCK
    return elements + 4 * out_features


def _emulated(fmt: str) -> bool:
    from mixquant.engines.vllm.settings import native_formats

    return fmt not in native_formats()[0]


class ScaledProduct(Product):
    """FP8 or INT8 on a GPU: vLLM's row-wise quantizer and a product with a scale per row and column.

    The product is CUTLASS's in vLLM, and for many rows in FP8 on Hopper cuBLASLt's in torch: at
    Qwen3-8B's shapes (docs/performance.md) it is the faster one where most of the arithmetic is, but it
    takes the CPU longer to launch.
    """

    def __init__(self, fmt: str, weight: Tensor) -> None:
        quantize = fp8_format.quantize if fmt == "fp8" else int8_format.quantize
        # In pieces: the quantizers compute in FP32, and a whole layer would need four times its size.
        pieces = [quantize(piece) for piece in weight.split(1024)]
        codes, scale = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        self._hold(fmt, codes, scale)

    @classmethod
    def of_codes(cls, codes: Tensor, scale: Tensor) -> ScaledProduct:
        """From a weight that is FP8 already: E4M3 codes ``[N, K]`` and FP32 scales ``[N, 1]``."""
        self = cls.__new__(cls)
        self._hold("fp8", codes, scale)
        return self

    def _hold(self, fmt: str, codes: Tensor, scale: Tensor) -> None:
        self.format = fmt
        self.kernel = CUBLAS if fmt == "fp8" and _hopper() else CUTLASS
        self.codes = codes  # [N, K]
        self.scale = scale  # [N, 1]
        self._operands = codes.t(), scale.t()
        self._cublas = self.kernel == CUBLAS
        self.nbytes = codes.nbytes + scale.nbytes

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[M, K]`` and FP32 scales ``[M, 1]``."""
        if self.format == "fp8":
            # Not by vLLM's Python wrapper, which takes as long as the operator.
            codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
            scale = torch.empty(len(rows), 1, device=rows.device)
            torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, rows, scale, None)
        else:
            from vllm import _custom_ops as ops

            codes, scale, _ = ops.scaled_int8_quant(rows)
        return codes, scale

    def multiply(self, encoded: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor) -> None:
        codes, scale = encoded
        # Straight into place: vLLM's Python wrapper makes a new matrix, which we would have to copy.
        # Not into columns of a wider one, whose stride the kernels for Hopper and later ignore.
        target = out if out.is_contiguous() else out.new_empty(out.shape)
        weight, weight_scale = self._operands
        if self._cublas and len(codes) >= MANY_ROWS and out.dtype == torch.bfloat16:
            torch._scaled_mm(
                codes,
                weight,
                scale,
                weight_scale,
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
                out=target,
            )
        else:
            torch.ops._C.cutlass_scaled_mm(target, codes, weight, scale, self.scale, bias)
        if target is not out:
            out.copy_(target)


@functools.cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


class OneDnnProduct(Product):
    """INT8 on a CPU: vLLM's row-wise quantizer and oneDNN's product."""

    format = "int8"
    kernel = ONEDNN

    def __init__(self, weight: Tensor) -> None:
        from vllm import _custom_ops as ops

        codes, scale = int8_format.quantize(weight)
        self.scale = scale  # the handler packs the codes but goes on reading the scales here
        self.handler = ops.create_onednn_scaled_mm(
            codes.t(),
            self.scale,
            weight.dtype,
            True,  # activations are quantized as they come
            False,  # symmetric
            32,  # shapes whose primitives are kept
        )
        self.nbytes = codes.nbytes + scale.nbytes

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[M, K]`` and FP32 scales ``[M, 1]``."""
        from vllm import _custom_ops as ops

        codes, scale, _ = ops.onednn_scaled_int8_quant(rows.contiguous(), None, None, True)
        return codes, scale

    def multiply(self, encoded: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor) -> None:
        from vllm import _custom_ops as ops

        codes, scale = encoded
        target = out if out.is_contiguous() else out.new_empty(out.shape)
        ops.onednn_scaled_mm(self.handler, codes, target, scale, None, None, bias)
        if target is not out:
            out.copy_(target)


class PreciseProduct(Product):
    """The part of a layer that stays BF16 where the rest of its weight is given back."""

    format = "bf16"
    kernel = Kernel("torch", native=True)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.clone()
        self.nbytes = self.weight.nbytes

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def multiply(self, encoded: Tensor, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(F.linear(encoded, self.weight, bias))


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
        return nvfp4_format.scale_rows(rows.to(torch.bfloat16))

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
        from mixquant.kernels.triton import nvfp4 as nvfp4_triton

        nvfp4_triton.linear(encoded, self.codes, self.block_scales, self.tensor_scale, bias, out)


def nvfp4_codes(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales (linear) and tensor scale of a weight ``[N, K]``."""
    how = recipe.block_scale
    scale = nvfp4_format.global_scale(weight.abs().amax().float(), how)
    # In pieces: quantizing needs several times the size of what it quantizes.
    pieces = [nvfp4_format.quantize(piece, scale, how) for piece in weight.split(1024)]
    codes, block_scales = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    return codes, block_scales, scale.reciprocal()


def nvfp4_product(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, dtype: torch.dtype
) -> Product:
    """The product in vLLM's kernel, or in ours where vLLM's would leave activations in BF16."""
    name = type(nvfp4_kernel()).__name__
    ours = (
        not _emulated("nvfp4")
        and any(part in name for part in _NO_FP4_PRODUCT)
        and dtype == torch.bfloat16
        and codes.shape[1] % 16 == 0
        and _triton_has_fp4()
    )
    if ours:
        return TritonNvfp4Product(codes, block_scales, tensor_scale)
    return Nvfp4Product(codes, block_scales, tensor_scale)


@functools.cache
def _triton_has_fp4() -> bool:
    """Whether this Triton takes E4M3 block scales: from 3.9."""
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= Version("3.9")


def nvfp4_kernel() -> Any:
    """vLLM's kernel for NVFP4 here: what it selects where the hardware has the format.

    Elsewhere vLLM would select one that leaves activations in BF16, so there it is the emulation.
    """
    from vllm.model_executor.kernels import linear

    if not _emulated("nvfp4"):
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

    one = torch.ones(1, device=codes.device)
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


class EmulatedProduct(Product):
    """A format that this machine does not multiply natively, in this project's own emulation."""

    kernel = EMULATION

    def __init__(self, fmt: str, weight: Tensor, options: dict[str, Any]) -> None:
        self._hold(fmt, BY_NAME[fmt].quantize_weight(weight, EMULATION, **options), options)

    @classmethod
    def of_weight(cls, fmt: str, weight: Any) -> EmulatedProduct:
        """From a weight that is quantized already, in this project's own representation."""
        self = cls.__new__(cls)
        self._hold(fmt, weight, {})
        return self

    def _hold(self, fmt: str, weight: Any, options: dict[str, Any]) -> None:
        self.format = fmt
        self.weight = weight
        self.options = options
        self.nbytes = weight.nbytes

    def encode(self, rows: Tensor) -> Any:
        return BY_NAME[self.format].quantize_rows(rows, EMULATION, **self.options)

    def multiply(self, encoded: Any, bias: Tensor | None, out: Tensor) -> None:
        BY_NAME[self.format].linear(encoded, self.weight, bias, out)
