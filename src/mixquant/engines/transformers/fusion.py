"""Fuses the quantization of activations into what produces them, for INT8 on a CPU.

Next to a product on VNNI or AMX the normalization in front of it, done as Transformers writes it, in
seven passes over memory, takes longer than the product. In a pass that quantizes, it becomes one
loop with the quantization of its result; so do the activation and the multiplication in front of
an MLP's last layer. Passes that quantize nothing run the modules' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mixquant.core.phase import PhasePlan, in_force, plan_in_force
from mixquant.core.rows import by_phase, quantize_once, remember_quantized, select
from mixquant.engines.source import statements_of_forward
from mixquant.engines.transformers.methods import put_in_front
from mixquant.engines.transformers.module import (
    PhaseLinear,
    precise_and_eager,
    without_gradient,
)
from mixquant.formats.int8 import INT8, ONEDNN, Int8Rows, Int8Weight, onednn_product
from mixquant.kernels.cpu import int8 as int8_cpu

# Which norm of a decoder layer feeds which of its projections. A wrong guess costs time, nothing
# else: the rows are only used by a layer that is given this very norm's output.
_FEEDS = (
    ("input_layernorm", ("self_attn.q_proj", "linear_attn.in_proj_qkv", "self_attn.qkv_proj")),
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.gate_up_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.gate_up_proj")),
)
# An MLP takes its rows in blocks of about so many: what lies between its products then stays in the
# cache, and is not allocated anew. Much smaller blocks only cost calls.
_MLP_BLOCK_ROWS = 1024
# The whole body of forward, as ast.unparse writes it.
_PRODUCT = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_MLPS = ((f"return {_PRODUCT}",), (f"down_proj = {_PRODUCT}", "return down_proj"))


def fuse(model: nn.Module) -> None:
    """Fuses what can be fused in a model whose linear layers are `PhaseLinear` already."""
    for layer in model.modules():
        for norm in _norms_before_int8(layer):
            put_in_front(norm, "forward", _norm)
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, nn.Module) and _is_gated_mlp(mlp):
            put_in_front(mlp, "forward", _gated_mlp)


def _norms_before_int8(layer: nn.Module) -> Iterator[nn.Module]:
    fed: set[str] = set()
    for name, projections in _FEEDS:
        norm = getattr(layer, name, None)
        for projection in projections:
            linear: Any = layer
            for part in projection.split("."):
                linear = getattr(linear, part, None)
            if projection not in fed and _int8_weight(linear) is not None and _is_rms_norm(norm):
                fed.add(projection)
                yield norm


def _is_rms_norm(norm: Any) -> TypeGuard[nn.Module]:
    """Whether a module computes what `int8_cpu.rms_norm_quantize` does: some scale by 1 + weight."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or eps is None or "forward" in vars(norm):
        return False
    x = torch.linspace(-3, 3, 4 * weight.numel(), dtype=weight.dtype).view(4, -1)
    with torch.no_grad():
        return torch.allclose(
            norm(x), int8_cpu.rms_norm_quantize(x, weight, eps)[0], rtol=0.02, atol=0.02
        )


def _is_gated_mlp(mlp: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    linears = [getattr(mlp, name, None) for name in names]
    if any(_int8_weight(linear) is None for linear in linears) or "forward" in vars(mlp):
        return False
    return is_written_as_gated_mlp(type(mlp)) and _fused_activation(mlp.act_fn) is not None


def is_written_as_gated_mlp(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is a gated MLP and nothing besides."""
    return statements_of_forward(kind) in _MLPS


def _fused_activation(activation: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What computes an activation together with what is around it; told by what it computes."""
    if not isinstance(activation, nn.Module) or activation._forward_hooks:
        return None
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = activation(x)
    if torch.allclose(y, nn.functional.silu(x), rtol=0, atol=1e-5):
        return int8_cpu.silu_mul_quantize
    if torch.allclose(y, nn.functional.gelu(x, approximate="tanh"), rtol=0, atol=1e-5):
        return int8_cpu.gelu_mul_quantize
    return None


def _int8_weight(linear: Any) -> Int8Weight | None:
    """The quantized weight of a layer that is all INT8 in oneDNN and has no bias, or None."""
    if not isinstance(linear, PhaseLinear) or linear.bias is not None or len(linear.layout) != 1:
        return None
    watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    if linear.layout[0][1] != "int8" or watched:
        return None  # somebody wants to see the layer called
    weight = linear.parts[0].weight
    return weight if isinstance(weight, Int8Weight) and weight.kernel == ONEDNN else None


def _plan_for(x: Tensor) -> PhasePlan | None:
    plan = plan_in_force()
    quantizes = plan is not None and plan.quantized and plan.rows == x.numel() // x.shape[-1]
    return plan if quantizes and x.device.type == "cpu" else None


def _norm(original: Callable[..., Tensor], norm: Any, *args: Any, **kwargs: Any) -> Tensor:
    if precise_and_eager() or len(args) != 1 or kwargs:
        return original(*args, **kwargs)
    return _phase_norm(original, norm, args[0])


def _gated_mlp(original: Callable[..., Tensor], mlp: Any, *args: Any, **kwargs: Any) -> Tensor:
    if precise_and_eager() or len(args) != 1 or kwargs:
        return original(*args, **kwargs)
    return _phase_gated_mlp(original, mlp, args[0])


@torch.compiler.disable
def _phase_norm(original: Callable[..., Tensor], norm: Any, x: Tensor) -> Tensor:
    plan = _plan_for(x)
    if plan is None:
        return original(x)
    with torch.no_grad():
        flat = x.reshape(plan.rows, x.shape[-1])
        y, codes, scale = int8_cpu.rms_norm_quantize(flat, norm.weight, norm.variance_epsilon)
        y = y.view(x.shape)
        rows = Int8Rows(*(select(part, plan, "quantized") for part in (codes, scale)))
    y = without_gradient(y, x, norm.weight)
    remember_quantized(y, plan, "int8", ONEDNN, rows)
    return y


@torch.compiler.disable
def _phase_gated_mlp(original: Callable[..., Tensor], mlp: Any, x: Tensor) -> Tensor:
    plan, activate = _plan_for(x), _fused_activation(mlp.act_fn)
    gate, up, down = map(_int8_weight, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    if plan is None or activate is None or gate is None or up is None or down is None:
        return original(x)

    def precise(some: Tensor) -> Tensor:
        with in_force(None):
            return original(some)

    def quantized(out: Tensor) -> None:
        rows = quantize_once(x, plan, "int8", ONEDNN, {})
        wide = out.dtype if out.dtype == torch.bfloat16 else torch.float32
        blocks = max(1, round(len(out) / _MLP_BLOCK_ROWS))
        split = (some.tensor_split(blocks) for some in (rows.codes_plus_128, rows.scale, out))
        for codes, scale, block in zip(*split, strict=True):
            inner = activate(
                onednn_product(codes, gate, wide), onednn_product(codes, up, wide), scale
            )
            INT8.linear(Int8Rows(*inner), down, None, block)

    with torch.no_grad():
        out = by_phase(x, down.shape[0], plan, precise, quantized)
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return without_gradient(out, x, *(linear.weight for linear in linears))
