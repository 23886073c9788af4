"""Activations that are quantized by what produces them, where a model's code is known to allow it.

In front of a layer whose weight is FP8 as a whole stands an RMSNorm or a SiLU-and-multiply, in models
that are written as Llama's are. There:

- the norm writes the codes of a pass's quantized rows beside its BF16 result, and the layer takes them;
- the activation is left to ``down_proj``, which computes it as it quantizes, and by vLLM's own kernel
  for precise rows.

Passes without quantized rows, those that CUDA graphs are captured from among them, launch as many
kernels as before. That the layer is given what the norm returned, and nobody else is, shows in the
source of the model's classes alone; where they are written otherwise, nothing is fused.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.vllm.linear import PhaseLinearMethod, computed_together, layer_of
from mixquant.phase import plan_in_force

# The bodies of forward, statement by statement, as ast.unparse writes them.
_LAYER = [
    "if residual is None:\n"
    "    residual = hidden_states\n"
    "    hidden_states = self.input_layernorm(hidden_states)\n"
    "else:\n"
    "    hidden_states, residual = self.input_layernorm(hidden_states, residual)",
    "hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)",
    "hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)",
    "hidden_states = self.mlp(hidden_states)",
    "return (hidden_states, residual)",
]
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
_ATTENTION = "qkv, _ = self.qkv_proj(hidden_states)"


def follow_producers(model: torch.nn.Module, with_lora: bool) -> int:
    """Joins norms and activations of a loaded model to the layers that read them; returns how many.

    Args:
        with_lora: whether adapters are served: they read what the layers are given.
    """
    if with_lora or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return 0
    joined = 0
    module: Any
    for module in model.modules():
        if _body(type(module)) in _MLPS:
            joined += _join_activation(module.act_fn, module.down_proj)
        if _body(type(module)) == _LAYER:
            attention, mlp = module.self_attn, module.mlp
            first, *others = _body(type(attention))
            if first == _ATTENTION and "hidden_states" not in " ".join(others):
                joined += _join_norm(module.input_layernorm, attention.qkv_proj)
            if _body(type(mlp)) in _MLPS:
                joined += _join_norm(module.post_attention_layernorm, mlp.gate_up_proj)
    return joined


def _read(kind: Any) -> list[str]:
    """The statements of a module's forward, without comments and formatting; none if unknown."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, SyntaxError, TypeError):
        return [""]
    assert isinstance(function, ast.FunctionDef)
    return [ast.unparse(statement) for statement in function.body]


_body: Callable[[Any], list[str]] = functools.cache(_read)


def _fusable(layer: Any) -> bool:
    """Whether every product of a layer takes FP8 codes that were made elsewhere."""
    from mixquant.engines.vllm.products import ScaledProduct
    from mixquant.kernels.fused_triton import why_not

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


def _join_activation(activation: Any, layer: Any) -> bool:
    if type(activation).__name__ != "SiluAndMul" or not _own(activation) or not _fusable(layer):
        return False
    layer.quant_method.activated = True
    activation._forward_method = MethodType(_unapplied, activation)
    return True


def _join_norm(norm: Any, layer: Any) -> bool:
    plain = type(norm).__name__ == "RMSNorm" and norm.has_weight
    plain = plain and norm.variance_size_override is None and norm.weight.dtype == torch.bfloat16
    if not plain or not _own(norm) or not _fusable(layer):
        return False
    norm.mixquant_number = layer.mixquant_number
    norm.mixquant_alone = norm._forward_method
    norm._forward_method = MethodType(_norm, norm)
    return True


def _own(operation: Any) -> bool:
    """Whether an operation still computes as vLLM has it, in a version that is written as known."""
    found = getattr(operation, "_forward_method", None)
    return getattr(found, "__func__", found) not in (None, _unapplied, _norm)


def _unapplied(self: Any, x: Tensor) -> Tensor:
    return x


def _norm(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None or x.ndim != 2:
        return self.mixquant_alone(x, residual)
    return torch.ops.mixquant.phase_rms_norm(
        x, residual, self.weight.data, self.variance_epsilon, self.mixquant_number
    )


def _phase_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, number: Tensor
) -> tuple[Tensor, Tensor]:
    from mixquant.kernels.fused_triton import rms_norm, room_for

    plan = plan_in_force()
    if plan is None or plan.rows != len(x) or not plan.quantized:
        return rms_norm(x, residual, weight, epsilon)
    rows = computed_together(plan)
    if rows is None:
        return rms_norm(x, residual, weight, epsilon)
    codes = room_for("fp8", rows[1] - rows[0], x.shape[1], x.device)
    normed, total = rms_norm(x, residual, weight, epsilon, codes, rows[0])
    layer_of(number).quant_method.offer(plan, normed, (codes.codes, codes.scale))
    return normed, total


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, number: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


_library = torch.library.Library("mixquant", "FRAGMENT")
_library.define(
    "phase_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon, Tensor number)"
    " -> (Tensor, Tensor)"
)
_library.impl("phase_rms_norm", _phase_rms_norm, "CompositeExplicitAutograd")
torch.library.register_fake("mixquant::phase_rms_norm", _fake, lib=_library)
