"""Experts in FP8, out of vLLM's grouped products: CUTLASS's, else Triton's."""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

from mixquant.checkpoints.quantized_tensors import Fp8Tensors
from mixquant.formats import fp8


class Fp8Experts:
    """E4M3 codes ``[E, N, K]`` and FP32 scales ``[E, N, 1]``; vLLM's kernel quantizes the rows."""

    def __init__(self, layer: Any) -> None:
        self.w13, self.w13_scale = _storage(layer.w13_weight)
        self.w2, self.w2_scale = _storage(layer.w2_weight)
        config = fp8_w8a8_moe_quant_config(
            w1_scale=self.w13_scale,
            w2_scale=self.w2_scale,
            per_act_token_quant=True,
            per_out_ch_quant=True,
            gemm1_alpha=layer.swiglu_alpha,
            gemm1_beta=layer.swiglu_beta,
            gemm1_clamp_limit=layer.swiglu_limit,
        )
        cls = kernel_class(layer.moe_config)
        assert cls is not None
        from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
            make_moe_prepare_and_finalize_no_dp_ep,
        )

        self._apply = mk.FusedMoEKernel(
            make_moe_prepare_and_finalize_no_dp_ep(use_monolithic=False),
            cls(moe_config=layer.moe_config, quant_config=config),
        ).apply
        self.kernel = f"vLLM {cls.__name__}"
        self.nbytes = sum(
            tensor.nbytes for tensor in (self.w13, self.w13_scale, self.w2, self.w2_scale)
        )

    def load(self, layer: Any) -> None:
        for weight, codes, scale in (
            (layer.w13_weight, self.w13, self.w13_scale),
            (layer.w2_weight, self.w2, self.w2_scale),
        ):
            for expert in range(weight.shape[0]):  # one at a time: there is an FP32 copy in between
                quantized, of_rows = fp8.quantize(weight[expert].data)
                codes[expert].copy_(quantized)
                scale[expert].copy_(of_rows)

    def take(self, expert: int, gate: Fp8Tensors, up: Fp8Tensors, down: Fp8Tensors) -> None:
        half, features = self.w13.shape[1] // 2, gate.shape[0]
        for codes, scale, start, part in (
            (self.w13, self.w13_scale, 0, gate),
            (self.w13, self.w13_scale, half, up),
        ):
            codes[expert][start : start + half].zero_()
            scale[expert][start : start + half] = 1
            codes[expert][start : start + features].copy_(part.codes)
            scale[expert][start : start + features].copy_(part.scale)
        self.w2[expert].zero_()
        self.w2[expert][:, :features].copy_(down.codes)
        self.w2_scale[expert].copy_(down.scale)

    def __call__(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self._apply(
            hidden_states=x,
            w1=self.w13,
            w2=self.w2,
            topk_weights=weights,
            topk_ids=ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=None,
            shared_experts_input=None,
        )


def kernel_class(moe: Any) -> Any:
    """vLLM's order for weights per channel and activations per token: CUTLASS, then Triton.

    Not vLLM's own selection: that follows --moe-backend, which is the user's choice for the BF16
    experts, and may pick a kernel that leaves activations in BF16.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe import (
        TritonOrCutlassExperts,
    )
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8DynamicTokenSym,
        kFp8StaticChannelSym,
    )

    for cls in (TritonOrCutlassExperts, TritonExperts):
        supported, _ = cls.is_supported_config(
            cls,
            moe,
            kFp8StaticChannelSym,
            kFp8DynamicTokenSym,
            mk.FusedMoEActivationFormat.Standard,
        )
        if supported:
            return cls
    return None


def _storage(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(weight.data, dtype=torch.float8_e4m3fn),
        torch.empty(*weight.shape[:2], 1, dtype=torch.float32, device=weight.device),
    )
