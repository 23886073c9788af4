"""Experts in NVFP4 on Blackwell, out of vLLM's CUTLASS grouped products. Not run on hardware yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import Nvfp4Tensors
from mixquant.engines.vllm import hardware
from mixquant.formats import nvfp4_blocks


class Nvfp4Experts:
    """NVFP4 codes and block scales of all experts, each row with a scale of its own.

    vLLM's method for NVFP4 experts takes activation scales from calibration, which a BF16 checkpoint
    has not. So this is its chain of operators (``run_cutlass_moe_fp4``) with what
    `mixquant.formats.nvfp4_blocks` does to rows: a power of two brings each row into range before either
    product and is taken out behind it, exact in BF16, and a row's codes depend on no other row.
    """

    kernel = "vLLM CUTLASS"

    def __init__(self, layer: Any, block_scale: nvfp4_blocks.BlockScale = "6") -> None:
        self.block_scale = block_scale  # of the weights; rows have "6"
        self.experts, rows, self.k = layer.w13_weight.shape
        self.n = layer.w2_weight.shape[2]
        self.gated = layer.activation.is_gated
        device = layer.w13_weight.device
        self.w13 = _storage(self.experts, rows, self.k, device)
        self.w2 = _storage(self.experts, self.k, self.n, device)
        self.ones = torch.ones(self.experts, dtype=torch.float32, device=device)
        self.nbytes = sum(tensor.nbytes for tensor in (*self.w13, *self.w2))

    @staticmethod
    def unsupported(layer: Any) -> str | None:
        """Why these experts cannot be in NVFP4, or None if they can."""
        moe = layer.moe_config
        n, k = moe.intermediate_size_per_partition, moe.hidden_dim
        if not hardware.has_nvfp4_experts():
            return "NVFP4 experts need Blackwell"
        if n % 64 or (2 * n) % 128 or k % 128:  # so that swizzling pads nothing
            return f"NVFP4 experts need multiples of 64 and 128, not {n} x {k}"
        if layer.activation not in (
            MoEActivation.SILU,
            MoEActivation.GELU,
            MoEActivation.GELU_TANH,
        ):
            return f"activation {layer.activation}"
        if layer.swiglu_limit is not None or layer.apply_router_weight_on_input:
            return "a clamped activation, or router weights on the input"
        return None

    def load(self, layer: Any) -> None:
        self.ones.fill_(1.0)  # level 2 of sleep throws it away with the weights
        for weight, (codes, scales, alphas) in (
            (layer.w13_weight, self.w13),
            (layer.w2_weight, self.w2),
        ):
            for expert in range(self.experts):
                matrix = weight[expert].data
                factor = nvfp4_blocks.global_scale(matrix.abs().amax().float(), self.block_scale)
                quantized, block_scales = nvfp4_blocks.quantize(matrix, factor, self.block_scale)
                codes[expert].copy_(quantized)
                scales[expert].copy_(swizzle_blockscale(block_scales))
                alphas[expert].copy_(factor.reciprocal())

    def take(self, expert: int, gate: Nvfp4Tensors, up: Nvfp4Tensors, down: Nvfp4Tensors) -> None:
        """Raises CheckpointError: gate and up, which are multiplied as one, have scales of their own."""
        self.ones.fill_(1.0)  # as in `load`
        if not torch.equal(gate.global_scale, up.global_scale):
            raise CheckpointError(
                f"gate and up of expert {expert} of a layer have different global scales in the prefill "
                "model; name experts in the recipe's 'ignore', or quantize both with one scale"
            )
        for (codes, scales, alphas), parts in ((self.w13, (gate, up)), (self.w2, (down,))):
            of_all = torch.zeros(scales.shape[1:], dtype=torch.float8_e4m3fn)
            codes[expert].zero_()
            for half, part in enumerate(parts):
                start = half * codes.shape[1] // 2  # of w13's two halves; 0 of w2
                rows, columns = part.codes.shape
                codes[expert][start : start + rows, :columns].copy_(part.codes)
                rows, columns = part.block_scales.shape
                of_all[start : start + rows, :columns] = part.block_scales
            scales[expert].copy_(swizzle_blockscale(of_all.to(scales.device)))
            alphas[expert].copy_(parts[0].global_scale[0].reciprocal())

    def __call__(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        (m, top_k), device = ids.shape, x.device

        def integers(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        offsets, scale_offsets = integers(self.experts + 1), integers(self.experts + 1)
        sizes13, sizes2 = integers(self.experts, 3), integers(self.experts, 3)
        to_expert_order = integers(m * top_k)  # sorted row -> token
        to_token_order = integers(m * top_k)  # token * top-k + choice -> sorted row
        ops.get_cutlass_moe_mm_data(
            ids.to(torch.int32),
            offsets,
            sizes13,
            sizes2,
            to_expert_order,
            to_token_order,
            self.experts,
            self.n,
            self.k,
            scale_offsets,
            is_gated=self.gated,
        )

        def product(rows: Tensor, weight: tuple[Tensor, Tensor, Tensor], sizes: Tensor) -> Tensor:
            codes, scales, alphas = weight
            q, block_scales = ops.scaled_fp4_experts_quant(
                rows, self.ones, offsets, scale_offsets, top_k
            )
            out = torch.empty(m * top_k, codes.shape[1], dtype=x.dtype, device=device)
            ops.cutlass_fp4_moe_mm(
                out,
                q,
                codes,
                block_scales,
                scales,
                alphas,
                sizes,
                offsets[:-1],
                scale_offsets[:-1],
            )
            return out

        scaled, row_scale = nvfp4_blocks.scale_rows(x)
        gate_up = product(ops.shuffle_rows(scaled, to_expert_order), self.w13, sizes13)
        gate_up *= row_scale.to(x.dtype)[to_expert_order.long()]
        hidden = torch.empty(m * top_k, self.n, dtype=x.dtype, device=device)
        apply_moe_activation(layer.activation, hidden, gate_up)
        scaled, row_scale = nvfp4_blocks.scale_rows(hidden)
        down = product(scaled, self.w2, sizes2)
        down = ops.shuffle_rows(down, to_token_order).view(m, top_k, self.k)
        by_choice = weights * row_scale[to_token_order.long()].view(m, top_k)
        return torch.bmm(by_choice.to(x.dtype).view(m, 1, top_k), down).view(m, self.k)


def _storage(
    experts: int, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device),
        torch.empty(experts, rows, columns // 16, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(experts, dtype=torch.float32, device=device),
    )
