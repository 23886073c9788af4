"""SiLU-and-multiply, computed as it is quantized, where a model's code is known to allow it.

In front of a ``down_proj`` whose weight is FP8 as a whole stands a SiLU-and-multiply, in models whose
MLP is written as Llama's or Qwen's. There the activation is left to ``down_proj``: for quantized rows
one kernel computes and quantizes it, which saves writing and reading it in BF16; for precise rows it is
vLLM's own. Passes without quantized rows, those that CUDA graphs are captured from among them, launch
as many kernels as before.

That down_proj is given what the activation returned, and nobody else is, shows in the source of the
model's class alone; where it is written otherwise, nothing is fused. RMSNorm is not fused: as an
operator of its own it costs the CPU more per pass than it saves the GPU where passes are short, and in
a compiled graph it would have to quantize in decode, too (docs/performance.md).
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

from mixquant.engines.vllm.linear import PhaseLinearMethod

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
        if _body(type(module)) in _MLPS
    )


def _read(kind: Any) -> list[str]:
    """The statements of a module's forward, without comments and formatting; none if unknown."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return []
    if not isinstance(function, ast.FunctionDef):
        return []
    return [ast.unparse(statement) for statement in function.body]


_body: Callable[[Any], list[str]] = functools.cache(_read)


def _join(activation: Any, layer: Any) -> bool:
    own = getattr(activation, "_forward_method", None)  # of vLLM's versions that are known
    if type(activation).__name__ != "SiluAndMul" or own is None or not _fusable(layer):
        return False
    layer.quant_method.activated = True
    activation._forward_method = MethodType(_unapplied, activation)
    return True


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


def _unapplied(self: Any, x: Tensor) -> Tensor:
    return x
