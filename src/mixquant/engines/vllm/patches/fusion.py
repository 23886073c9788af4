"""RMSNorm and SiLU-and-multiply, left to the layers behind them where a model's code allows it.

In front of a ``down_proj`` whose weight is FP8 as a whole stands a SiLU-and-multiply, in models whose
MLP is written as Llama's or Qwen's. There the activation is left to ``down_proj``: for quantized rows
one kernel computes and quantizes it, which saves writing and reading it in BF16; for precise rows it is
a kernel that computes it alone. In front of ``qkv_proj`` and of the MLP stands an RMSNorm; on Hopper it
becomes one operator with the layers behind it, which then return what they are given. Passes without
quantized rows, those that CUDA graphs are captured from among them, launch as many kernels as before.

That a layer is given what the norm or the activation returned, and nobody else is, shows in the source
of the model's classes alone; where they are written otherwise, nothing is fused. Nor are norms with
tensor parallelism, where vLLM may fuse them with the all-reduce in front of them.
"""

from __future__ import annotations

import importlib.util
import os
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.source import statements_of_forward
from mixquant.engines.vllm.linear.method import PhaseLinearMethod

# The bodies of forward, statement by statement, as ast.unparse writes them.
_MLPS = [
    [*begin, "x, _ = self.down_proj(x)", "return x"]
    for begin in (
        ["x, _ = self.gate_up_proj(x)", "x = self.act_fn(x)"],
        ["gate_up, _ = self.gate_up_proj(x)", "x = self.act_fn(gate_up)"],
        [  # from 0.33 on; calls act_fn where the method of down_proj is not vLLM's
            "x, _ = self.gate_up_proj(x)",
            "x = maybe_fused_act_quant(self.act_fn, x, self.down_proj)",
        ],
    )
]


_DECODER_LAYER = [
    "if residual is None:\n    residual = hidden_states\n"
    "    hidden_states = self.input_layernorm(hidden_states)\n"
    "else:\n    hidden_states, residual = self.input_layernorm(hidden_states, residual)",
    "hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)",
    "hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)",
    "hidden_states = self.mlp(hidden_states)",
    "return (hidden_states, residual)",
]
_ATTENTION_BEGINS = "qkv, _ = self.qkv_proj(hidden_states)"


def follow_activations(model: torch.nn.Module, with_lora: bool) -> int:
    """Leaves the activations of a loaded model to the layers that read them; returns how many.

    Args:
        with_lora: whether adapters are served: they read what the layers are given.
    """
    if with_lora or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return 0
    return sum(
        _join(module.act_fn, module.down_proj)
        for module in model.modules()
        if _body_of(module) in _MLPS
    )


def follow_norms(model: torch.nn.Module, with_lora: bool, ranks: int) -> int:
    """Leaves the norms of a loaded model to the layers that read them; returns how many.

    After `follow_activations`: what it has joined is an MLP whose layers follow each other.

    Args:
        with_lora: as of `follow_activations`.
        ranks: of tensor parallelism.
    """
    if with_lora or ranks > 1 or os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        return 0
    found = 0
    for module in model.modules():
        if _body_of(module) != _DECODER_LAYER:
            continue
        attention: Any = module.self_attn
        body = _body_of(attention)
        if body[:1] == [_ATTENTION_BEGINS] and "hidden_states" not in " ".join(body[1:]):
            found += _join_norm(module.input_layernorm, getattr(attention, "qkv_proj", None))
        mlp: Any = module.mlp
        if _body_of(mlp) in _MLPS:
            found += _join_norm(module.post_attention_layernorm, mlp.gate_up_proj, mlp.down_proj)
    return found


def _body(kind: Any) -> list[str]:
    """The statements of a module class's forward; none if unknown."""
    return list(statements_of_forward(kind))


def _body_of(module: torch.nn.Module) -> list[str]:
    """The same of a module, which may have a forward that its class has not."""
    return [] if "forward" in vars(module) else _body(type(module))


def _join(activation: Any, layer: Any) -> bool:
    own = getattr(activation, "_forward_method", None)  # of vLLM's versions that are known
    if type(activation).__name__ != "SiluAndMul" or own is None or not _fusable(layer):
        return False
    layer.quant_method.activated = True
    if layer.quant_method.fp8 is not None:
        layer.quant_method.fp8.activated = True
    activation._forward_method = MethodType(_unapplied, activation)
    return True


def _join_norm(norm: Any, layer: Any, behind: Any = None) -> bool:
    method = getattr(layer, "quant_method", None)
    if (
        not isinstance(method, PhaseLinearMethod)
        or method.fp8 is None
        or method.in_norm
        or type(norm).__name__ != "RMSNorm"
        or getattr(norm, "_forward_method", None) is None  # of vLLM's versions that are known
        or not getattr(norm, "has_weight", False)
        or norm.variance_size_override is not None
        or norm.weight.dtype != torch.bfloat16
    ):
        return False
    # Not before: where there is no such layer, there may be no Triton.
    from mixquant.kernels.triton.fused import why_not

    if why_not("fp8", method.shape[1]) is not None:
        return False
    method.fp8.norm = norm.weight.data, norm.variance_epsilon
    method.in_norm = True
    norm.mixquant_number = layer.mixquant_number
    norm.mixquant_features = method.shape[0]
    its = getattr(behind, "quant_method", None)
    if isinstance(its, PhaseLinearMethod) and its.fp8 is not None and its.activated:
        its.in_norm, method.behind = True, behind
        norm.mixquant_features = its.shape[0]
    norm._forward_method = MethodType(_with_product, norm)
    return True


def _fusable(layer: Any) -> bool:
    """Whether every product of a layer takes FP8 codes that were made elsewhere."""
    from mixquant.engines.vllm.products.choose import ScaledProduct
    from mixquant.kernels.triton.fused import why_not

    method = getattr(layer, "quant_method", None)
    return (
        isinstance(method, PhaseLinearMethod)
        and hasattr(layer, "mixquant_number")
        and method.dtype == torch.bfloat16
        and why_not("fp8", method.shape[1]) is None
        and all(
            isinstance(product, ScaledProduct) and product.format == "fp8"
            for _, product in method.products
        )
    )


def _unapplied(self: Any, x: Tensor) -> Tensor:
    return x


def _with_product(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """The product of the layers behind a norm; with a residual, and what is the residual then."""
    number, features = self.mixquant_number, self.mixquant_features
    if residual is None:
        return torch.ops.mixquant.phase_linear(x, None, number, features)
    return torch.ops.mixquant.phase_add_norm_linear(x, residual, number, features)
