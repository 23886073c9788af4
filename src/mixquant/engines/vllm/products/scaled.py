"""Products in FP8 and INT8 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.products.base import Product
from mixquant.formats import Kernel, fp8, int8

CUTLASS = Kernel("vLLM CUTLASS", native=True)
CUBLAS = Kernel("cuBLASLt, CUTLASS", native=True)  # by the number of rows and the output's type
CUBLAS_FROM_ROWS = 576


class ScaledProduct(Product):
    """FP8 or INT8 on a GPU: vLLM's row-wise quantizer and a product with a scale per row and column.

    The product is CUTLASS's in vLLM, and for many rows in FP8 on Hopper cuBLASLt's in torch, which is
    the faster one at Qwen3-8B's shapes (docs/develop/lab-notes.md).
    """

    def __init__(self, fmt: str, weight: Tensor) -> None:
        quantize = fp8.quantize if fmt == "fp8" else int8.quantize
        # In pieces: the quantizers compute in FP32, and a whole layer would need four times its size.
        pieces = [quantize(piece) for piece in weight.split(1024)]
        codes, scale = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        self._set_weight(fmt, codes, scale)

    @classmethod
    def of_codes(cls, codes: Tensor, scale: Tensor) -> ScaledProduct:
        """From a weight that is FP8 already: E4M3 codes ``[N, K]`` and FP32 scales ``[N, 1]``."""
        self = cls.__new__(cls)
        self._set_weight("fp8", codes, scale)
        return self

    def _set_weight(self, fmt: str, codes: Tensor, scale: Tensor) -> None:
        self.format = fmt
        self.kernel = CUBLAS if fmt == "fp8" and hardware.is_hopper() else CUTLASS
        self.codes = codes  # [N, K]
        self.scale = scale  # [N, 1]
        self._operands = codes.t(), scale.t()
        self._cublas = self.kernel == CUBLAS
        self.nbytes = codes.nbytes + scale.nbytes

    def take(self, other: ScaledProduct) -> None:
        """Becomes the same as another product, in the memory that captured CUDA graphs read."""
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[M, K]`` and FP32 scales ``[M, 1]``."""
        if self.format == "fp8":
            # Not by vLLM's Python wrapper, which takes as long as the operator.
            codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
            scale = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
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
        if self._cublas and len(codes) >= CUBLAS_FROM_ROWS and out.dtype == torch.bfloat16:
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
