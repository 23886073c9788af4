"""Which activations are left to the layer that reads them, and that the layer then computes them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_engines import require_vllm

require_vllm()

from mixquant.engines.vllm import fusion, linear  # noqa: E402
from mixquant.engines.vllm.fusion import follow_activations  # noqa: E402
from mixquant.engines.vllm.products import ScaledProduct  # noqa: E402
from mixquant.phase import everything_quantized, in_force  # noqa: E402


class SiluAndMul(torch.nn.Module):
    """As vLLM's: what it computes is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self._forward_method: Callable[[Tensor], Tensor] = reference

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_method(x)


def reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class GeluAndMul(SiluAndMul):
    pass


class Down(torch.nn.Module):
    def __init__(self, fmt: str, dtype: torch.dtype) -> None:
        super().__init__()
        method = self.quant_method = linear.PhaseLinearMethod.__new__(linear.PhaseLinearMethod)
        product = ScaledProduct.__new__(ScaledProduct)
        product.format = fmt
        method.shape, method.dtype, method.activated = (4, 8), dtype, False
        method.only_quantized, method.products = False, (((0, 4), product),)
        self.mixquant_method, self.mixquant_number = method, torch.tensor(10**6)
        self.weight = torch.nn.Parameter(torch.randn(4, 8, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, x), None


class MLP(torch.nn.Module):
    def __init__(
        self,
        activation: type[SiluAndMul] = SiluAndMul,
        fmt: str = "fp8",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.act_fn, self.down_proj = activation(), Down(fmt, dtype)

    def gate_up_proj(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)  # of vLLM's Llama
        x, _ = self.down_proj(x)
        return x


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x) * 2
        x, _ = self.down_proj(x)
        return x


@pytest.fixture(autouse=True)
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fusion.importlib.util, "find_spec", lambda name: SimpleNamespace())


def joined(model: torch.nn.Module, with_lora: bool = False) -> int:
    return follow_activations(torch.nn.ModuleList([model]), with_lora)


def test_the_known_models_of_the_installed_vllm() -> None:
    from vllm.model_executor.models.llama import LlamaMLP
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    for known in (LlamaMLP, Qwen2MLP):
        assert fusion._body(known) in fusion._MLPS


@pytest.mark.parametrize(
    ("model", "with_lora", "expected"),
    [
        (MLP, False, 1),
        (MLP, True, 0),
        (Scaled, False, 0),
        (lambda: MLP(GeluAndMul), False, 0),
        (lambda: MLP(fmt="int8"), False, 0),
        (lambda: MLP(dtype=torch.float16), False, 0),
    ],
)
def test_which_are_joined(model: Any, with_lora: bool, expected: int) -> None:
    pytest.importorskip("triton")
    mlp = model()
    assert joined(mlp, with_lora) == expected
    assert joined(mlp, with_lora) in (0, expected)  # a model that is loaded anew
    x = torch.randn(3, 16)
    assert torch.equal(mlp.act_fn(x), x if expected else reference(x))
    assert mlp.down_proj.quant_method.activated == bool(expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_layer_computes_it(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("mixquant.kernels.fused_triton")
    x = torch.randn(300, 16).bfloat16()
    mlp = MLP()
    wanted = reference(x.float()) @ mlp.down_proj.weight.float().T
    linear._layers[10**6] = mlp.down_proj
    assert joined(mlp) == 1
    monkeypatch.setattr(fused, "precise_silu_and_mul", reference)
    seen = []

    def silu_and_mul(x: Tensor, into: Any) -> None:
        seen.append(len(x))
        into.codes.copy_(reference(x.float()).to(torch.float8_e4m3fn))
        into.scale.fill_(1)

    def multiply(product: Any, encoded: Any, bias: Any, out: Tensor) -> None:
        codes, scale = encoded
        out.copy_(codes.float() * scale @ mlp.down_proj.weight.float().T)

    monkeypatch.setattr(fused, "silu_and_mul", silu_and_mul)
    monkeypatch.setattr(ScaledProduct, "multiply", multiply)
    monkeypatch.setattr(
        linear.PhaseLinearMethod,
        "precise",
        lambda method, layer, x, bias: method.input_of(x) @ layer.weight.T,
    )
    with in_force(everything_quantized(300) if quantized else None):
        got = mlp(x).float()
    assert seen == ([300] if quantized else [])
    assert (got - wanted).norm() / wanted.norm() < (0.06 if quantized else 0.01)
