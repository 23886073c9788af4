"""Products in INT8 on a CPU."""

from __future__ import annotations

from torch import Tensor

from mixquant.engines.vllm.products.base import Product
from mixquant.formats import Kernel, int8

ONEDNN = Kernel("vLLM oneDNN", native=True)


class OneDnnProduct(Product):
    """INT8 on a CPU: vLLM's row-wise quantizer and oneDNN's product."""

    format = "int8"
    kernel = ONEDNN

    def __init__(self, weight: Tensor) -> None:
        from vllm import _custom_ops as ops

        codes, scale = int8.quantize(weight)
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
