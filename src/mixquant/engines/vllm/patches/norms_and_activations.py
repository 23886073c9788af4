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

import os
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.source import statements_of_forward
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.linear.method import PhaseLinearMethod
from mixquant.engines.vllm.patches.outcome import Outcome
from mixquant.engines.vllm.products.scaled import ScaledProduct

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


def fuse_activations(model: torch.nn.Module, with_lora: bool) -> Outcome:
    """Leaves the activations of a loaded model to the layers that read them.

    Args:
        with_lora: whether adapters are served: they read what the layers are given.
    """
    what = "activations fused"
    candidates = sum(type(module).__name__.endswith("AndMul") for module in model.modules())
    why = "LoRA adapters read them" if with_lora else hardware.why_no_triton()
    if why is not None:
        return Outcome.nowhere(what, candidates, why)
    found = [
        _fuse_activation(module.act_fn, module.down_proj)
        for module in model.modules()
        if _body_of(module) in _MLPS
    ]
    return Outcome(what, tuple(found + [_WRITTEN_OTHERWISE] * (candidates - len(found))))


def fuse_norms(model: torch.nn.Module, with_lora: bool, ranks: int) -> Outcome:
    """Leaves the norms of a loaded model to the layers that read them.

    After `fuse_activations`, which decides for an MLP whether its layers follow each other.

    Args:
        with_lora: as of `fuse_activations`.
        ranks: of tensor parallelism.
    """
    what = "norms fused"
    candidates = _norms_of_layers(model)
    why = (
        "LoRA adapters read them"
        if with_lora
        else "vLLM fuses them with the all-reduce of tensor parallelism"
        if ranks > 1
        else "VLLM_BATCH_INVARIANT is set"
        if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
        else None
    )
    if why is not None:
        return Outcome.nowhere(what, candidates, why)
    found: list[str | None] = []
    for module in model.modules():
        if _body_of(module) != _DECODER_LAYER:
            continue
        attention: Any = module.self_attn
        body = _body_of(attention)
        if body[:1] == [_ATTENTION_BEGINS] and "hidden_states" not in " ".join(body[1:]):
            found.append(_fuse_norm(module.input_layernorm, getattr(attention, "qkv_proj", None)))
        mlp: Any = module.mlp
        if _body_of(mlp) in _MLPS:
            why = _fuse_norm(module.post_attention_layernorm, mlp.gate_up_proj, mlp.down_proj)
            found.append(why)
    return Outcome(what, tuple(found + [_WRITTEN_OTHERWISE] * (candidates - len(found))))


_WRITTEN_OTHERWISE = "the model's code is not a known one"


def _norms_of_layers(model: torch.nn.Module) -> int:
    """How many norms stand in the decoder layers themselves: not a head's, nor the last one."""
    return sum(
        type(child).__name__.endswith("RMSNorm")
        for layers in model.modules()
        if isinstance(layers, torch.nn.ModuleList)
        for layer in layers
        for child in layer.children()
    )


def _body(kind: Any) -> list[str]:
    """The statements of a module class's forward; none if unknown."""
    return list(statements_of_forward(kind))


def _body_of(module: torch.nn.Module) -> list[str]:
    """The same of a module, which may have a forward that its class has not."""
    return [] if "forward" in vars(module) else _body(type(module))


def _fuse_activation(activation: Any, layer: Any) -> str | None:
    """Leaves an activation to the layer behind it; or returns why that cannot be."""
    if type(activation).__name__ != "SiluAndMul":
        return f"{type(activation).__name__} has no fused kernel"
    if getattr(activation, "_forward_method", None) is None:
        return "this vLLM calls activations in another way"
    if (why := _why_no_codes(layer)) is not None:
        return why
    layer.quant_method.activated = True
    if layer.quant_method.fp8 is not None:
        layer.quant_method.fp8.activated = True
    activation._forward_method = MethodType(_unapplied, activation)
    return None


def _fuse_norm(norm: Any, layer: Any, following: Any = None) -> str | None:
    """Leaves a norm to the layer behind it, and to the one ``following``; or returns why not."""
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, PhaseLinearMethod) or method.fp8 is None:
        return hardware.why_no_fp8_layers() or "the layer behind it is not FP8 as a whole"
    if method.in_norm:
        return "another norm stands in front of its layer"
    if type(norm).__name__ != "RMSNorm" or not getattr(norm, "has_weight", False):
        return f"{type(norm).__name__} has no fused kernel"
    if getattr(norm, "_forward_method", None) is None:
        return "this vLLM calls norms in another way"
    if norm.variance_size_override is not None or norm.weight.dtype != torch.bfloat16:
        return "its weight is not BF16 over the whole row"
    # Not before: where there is no such layer, there may be no Triton.
    from mixquant.kernels.triton.fused import unsupported_width

    if (why := unsupported_width("fp8", method.shape[1])) is not None:
        return why
    method.fp8.norm = norm.weight.data, norm.variance_epsilon
    method.in_norm = True
    norm.mixquant_number = layer.mixquant_number
    norm.mixquant_features = method.shape[0]
    next_method = getattr(following, "quant_method", None)
    if (
        isinstance(next_method, PhaseLinearMethod)
        and next_method.fp8 is not None
        and next_method.activated
    ):
        next_method.in_norm, method.following = True, following
        norm.mixquant_features = next_method.shape[0]
    norm._forward_method = MethodType(_with_product, norm)
    return None


def _why_no_codes(layer: Any) -> str | None:
    """Why not every product of a layer takes FP8 codes that were made elsewhere, or None."""
    from mixquant.kernels.triton.fused import unsupported_width

    method = getattr(layer, "quant_method", None)
    if not isinstance(method, PhaseLinearMethod) or not hasattr(layer, "mixquant_number"):
        return "the layer behind it stays BF16"
    if method.dtype != torch.bfloat16:
        return f"activations are {method.dtype}"
    if not all(
        isinstance(product, ScaledProduct) and product.format == "fp8"
        for _, product in method.products
    ):
        return "the layer behind it is not FP8 as a whole"
    return unsupported_width("fp8", method.shape[1])


def _unapplied(self: Any, x: Tensor) -> Tensor:
    return x


def _with_product(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """The product of the layers behind a norm; with a residual, and what is the residual then."""
    number, features = self.mixquant_number, self.mixquant_features
    if residual is None:
        return torch.ops.mixquant.phase_linear(x, None, number, features)
    return torch.ops.mixquant.phase_add_norm_linear(x, residual, number, features)
