"""Which norms and activations are left to the layers that read them, which then compute them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_engines import require_vllm

require_vllm()

from mixquant.core.phase import everything_quantized, in_force  # noqa: E402
from mixquant.engines.vllm import hardware  # noqa: E402
from mixquant.engines.vllm.linear import method as linear  # noqa: E402
from mixquant.engines.vllm.linear import operator  # noqa: E402
from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer  # noqa: E402
from mixquant.engines.vllm.patches import norms_and_activations as patch  # noqa: E402
from mixquant.engines.vllm.patches.norms_and_activations import fuse_activations, fuse_norms  # noqa: E402
from mixquant.engines.vllm.products.scaled import ScaledProduct  # noqa: E402


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
    monkeypatch.setattr(hardware, "is_hopper", lambda: True)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: SimpleNamespace())


def joined(model: torch.nn.Module, with_lora: bool = False) -> int:
    return fuse_activations(torch.nn.ModuleList([model]), with_lora).taken


def replaced() -> MLP:
    """An MLP whose class says one thing, and which does another."""
    mlp = MLP()
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(x) * 2)[0]  # type: ignore[method-assign]
    return mlp


def test_the_known_models_of_the_installed_vllm() -> None:
    from vllm.model_executor.models.llama import LlamaMLP
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    for known in (LlamaMLP, Qwen2MLP):
        assert patch._body(known) in patch._MLPS

    from vllm.model_executor.models import llama, qwen2, qwen3

    for layer in (llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer, qwen3.Qwen3DecoderLayer):
        assert patch._body(layer) == patch._DECODER_LAYER
    for attention in (llama.LlamaAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention):
        assert patch._body(attention)[0] == patch._ATTENTION_BEGINS


@pytest.mark.parametrize(
    ("model", "with_lora", "expected"),
    [
        (MLP, False, 1),
        (MLP, True, 0),
        (Scaled, False, 0),
        (replaced, False, 0),
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
    fused = pytest.importorskip("mixquant.kernels.triton.fused")
    x = torch.randn(300, 16).bfloat16()
    mlp = MLP()
    wanted = reference(x.float()) @ mlp.down_proj.weight.float().T
    operator._layers[10**6] = mlp.down_proj
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


# --- norms --------------------------------------------------------------------------------------------


class RMSNorm(torch.nn.Module):
    """As vLLM's: what it computes is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
        self.has_weight, self.variance_epsilon, self.variance_size_override = True, 1e-6, None
        self._forward_method: Callable[..., Any] = lambda x, residual=None: x

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self._forward_method(x, residual)


class Gemma(RMSNorm):
    pass


class Linear(Down):
    """An FP8 layer on Hopper."""

    def __init__(self, fp8: bool = True) -> None:
        super().__init__("fp8", torch.bfloat16)
        self.quant_method.shape = (24, 8)
        if fp8:
            self.quant_method.fp8 = Fp8Layer((24, 8))


class Attention(torch.nn.Module):
    def __init__(self, fp8: bool = True) -> None:
        super().__init__()
        self.qkv_proj = Linear(fp8)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        return qkv


class Gated(Attention):
    """Something else reads its input."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        return qkv * hidden_states


class FusedMLP(torch.nn.Module):
    def __init__(self, activation: type[SiluAndMul] = SiluAndMul) -> None:
        super().__init__()
        self.gate_up_proj, self.act_fn, self.down_proj = Linear(), activation(), Linear()
        self.down_proj.quant_method.shape = (8, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x = self.act_fn(gate_up)
        x, _ = self.down_proj(x)
        return x


class Layer(torch.nn.Module):
    def __init__(
        self,
        norm: type[RMSNorm] = RMSNorm,
        attention: type[Attention] = Attention,
        mlp: Callable[[], torch.nn.Module] = FusedMLP,
        fp8: bool = True,
    ) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn, self.mlp = attention(fp8), mlp()

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class Other(Layer):
    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def wide() -> Layer:
    layer = Layer()
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.variance_size_override = 4
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "expected"),
    [
        (Layer, {}, (True, True, True)),
        (Layer, {"with_lora": True}, (False, False, False)),
        (Layer, {"ranks": 2}, (False, False, False)),
        (Other, {}, (False, False, False)),
        (lambda: Layer(norm=Gemma), {}, (False, False, False)),
        (wide, {}, (False, False, False)),
        (lambda: Layer(fp8=False), {}, (False, True, True)),
        (lambda: Layer(attention=Gated), {}, (False, True, True)),
        # What the activation returns is not down_proj's alone to compute.
        (lambda: Layer(mlp=lambda: FusedMLP(GeluAndMul)), {}, (True, True, False)),
        (lambda: Layer(mlp=lambda: Scaled()), {}, (True, False, False)),
    ],
)
def test_which_norms_are_joined(
    layer: Any, options: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    """With qkv_proj; with gate_up_proj; and with down_proj behind it."""
    pytest.importorskip("triton")
    model = layer()
    arguments = {"with_lora": False, "ranks": 1, **options}
    fuse_activations(model, arguments["with_lora"])
    assert fuse_norms(model, **arguments).taken == sum(expected[:2])
    assert fuse_norms(model, **arguments).taken == 0  # a model that is loaded anew
    qkv, mlp = model.self_attn.qkv_proj.quant_method, model.mlp
    gate_up = getattr(getattr(mlp, "gate_up_proj", None), "quant_method", None)
    down = mlp.down_proj.quant_method
    found = qkv.in_norm, getattr(gate_up, "in_norm", False), down.in_norm
    assert found == expected
    norm = model.post_attention_layernorm
    if expected[1]:
        behind = mlp.down_proj if expected[2] else None
        assert gate_up is not None and gate_up.following is behind
        assert norm.mixquant_features == (8 if expected[2] else 24)
        weight, epsilon = gate_up.fp8.norm
        assert torch.equal(weight, norm.weight) and epsilon == norm.variance_epsilon


def test_without_triton_norms_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU: there are no layers that take them, and nothing may import Triton."""
    monkeypatch.setitem(sys.modules, "mixquant.kernels.triton.fused", None)
    layer = Layer(fp8=False, mlp=MLP)
    assert fuse_norms(layer, with_lora=False, ranks=1).taken == 0
    layer.mlp.gate_up_proj = Linear(fp8=False)
    assert fuse_norms(layer, with_lora=False, ranks=1).taken == 0


def test_batch_invariant_vllm_keeps_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert fuse_norms(Layer(), with_lora=False, ranks=1).taken == 0


def test_a_joined_norm_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    layer = Layer()
    fuse_activations(layer, False)
    fuse_norms(layer, with_lora=False, ranks=1)
    seen = []

    def alone(x: Tensor, bias: Any, number: Tensor, features: int) -> Tensor:
        seen.append(("alone", int(number), features))
        return x

    def with_sum(x: Tensor, residual: Tensor, number: Tensor, features: int) -> Any:
        seen.append(("with a sum", int(number), features))
        return x + 1, residual + x

    operators = SimpleNamespace(phase_linear=alone, phase_add_norm_linear=with_sum)
    monkeypatch.setattr(torch.ops, "mixquant", operators)
    x = torch.zeros(3, 8)
    hidden, residual = layer(x, x, None)
    assert seen == [("alone", 10**6, 24), ("with a sum", 10**6, 8)]
    assert torch.equal(hidden, x + 1) and torch.equal(residual, x)
    layer(x, x, x)
    assert seen[2] == ("with a sum", 10**6, 24)
