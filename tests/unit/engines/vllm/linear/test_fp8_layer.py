"""Where the rows of a pass go in an FP8 layer on Hopper, with stand-ins for the kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.linear import fp8_layer, operator
from mixquant.engines.vllm.linear import method as linear
from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer, multiply
from mixquant.engines.vllm.linear.route import Route
from mixquant.engines.vllm.products.scaled import ScaledProduct
from mixquant.kernels.triton import FEW_ROWS

K, N = 16, 24
EPS = 1e-5
CODED = 7.0  # what stands for a row's codes is the row, times this


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    total = x.float() + (0 if residual is None else residual.float())
    return total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


class Product(ScaledProduct):
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def multiply(self, encoded: tuple[Tensor, Tensor], bias: Any, out: Tensor) -> None:
        codes, scale = encoded
        assert len(codes) == len(scale) == len(out) and out.is_contiguous() and bias is None
        LOG.append("quantized")
        out.copy_(codes @ self.weight.float().T)


LOG: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def a_hopper() -> Any:
    """The kernels as they compute, in the order in which they are launched."""
    with pytest.MonkeyPatch.context() as patch:
        few = pytest.importorskip("mixquant.kernels.triton.few_rows")
        fused = pytest.importorskip("mixquant.kernels.triton.fused")

        def few_rows(
            x: Tensor,
            weight: Tensor,
            out: Tensor,
            rows_of_x: Tensor | None = None,
            rows_of_out: Tensor | None = None,
        ) -> None:
            x = x if rows_of_x is None else x[rows_of_x]
            assert 0 < len(x) <= FEW_ROWS
            assert weight.is_contiguous()
            LOG.append("few")
            products = (x.double() @ weight.double().T).to(out.dtype)
            if rows_of_out is None:
                assert len(out) == len(x)
                out.copy_(products)
            else:
                out[rows_of_out] = products

        def precise_silu_and_mul(x: Tensor) -> Tensor:
            return silu_and_mul(x).bfloat16()

        def precise_rms_norm(
            x: Tensor, residual: Any, weight: Tensor, eps: float, total: Any
        ) -> Tensor:
            if total is not None:
                total.copy_(x + residual)
            return rms_norm(x, residual, weight, eps).bfloat16()

        def quantize(into: Any, values: Tensor) -> None:
            assert into.codes.shape == values.shape
            into.codes.copy_(values.float() * CODED)
            if into.precise is not None:
                there = into.precise_numbers >= 0
                into.precise[into.precise_numbers[there].long()] = values[there].bfloat16()

        def quantize_norm(
            x: Tensor, residual: Any, weight: Tensor, eps: float, into: Any, total: Any
        ) -> None:
            if total is not None:
                total.copy_(x + residual)
            quantize(into, rms_norm(x, residual, weight, eps))

        def plain(codes: Tensor, x: Tensor, scale: Tensor, bound: Any) -> None:
            quantize(fused.Codes(codes, scale), x)

        def empty_codes(fmt: str, rows: int, width: int, device: Any) -> Any:
            return fused.Codes(torch.full((rows, width), torch.nan), torch.ones(rows, 1))

        operators = SimpleNamespace(dynamic_per_token_scaled_fp8_quant=plain)
        patch.setattr(torch.ops, "_C", operators, raising=False)
        patch.setattr(few, "few_rows", few_rows)
        patch.setattr(fused, "precise_silu_and_mul", precise_silu_and_mul)
        patch.setattr(fused, "precise_rms_norm", precise_rms_norm)
        patch.setattr(fused, "silu_and_mul", lambda x, into: quantize(into, silu_and_mul(x)))
        patch.setattr(fused, "rms_norm", quantize_norm)
        patch.setattr(fused, "empty_codes", empty_codes)
        patch.setattr(hardware, "why_no_fp8_layers", lambda: None)
        yield


@st.composite
def plans(draw: st.DrawFn) -> PhasePlan:
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 70), st.integers(1, 60)), min_size=1, max_size=6)
    )
    prompts = [first + count - draw(st.integers(0, 3)) for first, count in sequences]
    padding = draw(st.sampled_from([0, 0, 5]))
    thresholds = Thresholds(0, draw(st.integers(0, 20)), draw(st.integers(0, 2)))
    return plan_pass(
        thresholds,
        np.array([*(first for first, _ in sequences), -padding]),
        np.array([*(count for _, count in sequences), padding]),
        np.array([*(max(0, prompt) for prompt in prompts), 0]),
    )


def a_layer(kind: str, features: int = N, width: int = K) -> Fp8Layer:
    weight = torch.nn.Parameter(torch.randn(features, width).bfloat16(), requires_grad=False)
    layer = Fp8Layer((features, width))
    layer.set_weights(weight, Product(weight))
    if kind.startswith("norm"):
        layer.norm = torch.rand(width).bfloat16() + 0.5, EPS
    layer.activated = kind == "activated"
    return layer


KINDS = {
    "plain": ["plain"],
    "activated": ["activated"],
    "norm": ["norm"],
    "norm of a sum": ["norm"],
    "MLP": ["norm", "activated"],
}


def reference(layers: list[Fp8Layer], x: Tensor, residual: Tensor | None, code: float) -> Tensor:
    """In FP64 but for what is rounded on the way."""
    for layer in layers:
        seen = x.float()
        if layer.norm is not None:
            seen = rms_norm(x, residual, *layer.norm)
        elif layer.activated:
            seen = silu_and_mul(x)
        rows = seen.double() * code if code != 1 else seen.bfloat16().double()
        x, residual = (rows @ layer.weight.double().T).bfloat16(), None
    return x.double()


@settings(deadline=None)
@given(plans(), st.sampled_from(sorted(KINDS)))
def test_each_row_is_multiplied_in_its_precision(plan: PhasePlan, kind: str) -> None:
    if not plan.quantized:
        return
    torch.manual_seed(0)
    layers = [a_layer(one) for one in KINDS[kind]]
    if kind == "MLP":
        layers = [a_layer("norm", 2 * N, K), a_layer("activated", K, N)]
    x = torch.randn(plan.rows, 2 * K if kind == "activated" else K).bfloat16()
    residual = torch.randn(plan.rows, K).bfloat16() if kind in ("norm of a sum", "MLP") else None
    total = None if residual is None else torch.full_like(residual, torch.nan)
    LOG.clear()
    out = multiply(layers, x, residual, plan, total)
    if residual is not None:
        assert total is not None and torch.equal(total, x + residual)
    precise = reference(layers, x, residual, 1)
    quantized = reference(layers, x, residual, CODED)
    for wanted, ranges in ((precise, plan.precise), (quantized, plan.quantized)):
        size = wanted.abs().max().item()
        for start, stop in ranges:
            torch.testing.assert_close(
                out[start:stop].double(), wanted[start:stop], rtol=0.02, atol=0.01 * size
            )
    assert not out.isnan().any(), "padding must not be what lay in this memory"
    few = 0 < plan.precise_rows <= FEW_ROWS
    assert (["quantized", "few"] if few else ["quantized"]) * len(layers) == LOG


def test_what_the_product_leaves_out() -> None:
    """Rows at the ends, if they are more than a tenth; scales begin where cuBLASLt can read them."""
    for sequences, quantized in (
        ([(0, 60, 60)], (0, 60)),
        ([*[(99, 1, 99)] * 5, (0, 60, 60)], (0, 65)),
        ([*[(99, 1, 99)] * 9, (0, 60, 60)], (8, 68)),
    ):
        plan = plan_pass(Thresholds(), *zip(*sequences, strict=True))
        assert Route(plan, torch.device("cpu")).quantized == quantized


def test_layers_share_the_empty_codes_codes() -> None:
    plan = everything_quantized(20)
    route = fp8_layer.route_of(plan, torch.device("cpu"))
    assert route is fp8_layer.route_of(plan, torch.device("cpu"))
    buffers = {id(route.buffers(K, apart, torch.device("cpu"))[0]) for apart in (True, False, True)}
    assert len(buffers) == 2


@pytest.mark.parametrize("plan", ["none", "other rows", "all"])
@pytest.mark.parametrize("kind", ["norm", "norm of a sum", "MLP"])
def test_the_operators(kind: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer, or two, that are multiplied where the norm in front of them is."""
    monkeypatch.setattr(
        linear.UnquantizedLinearMethod,
        "apply",
        lambda method, layer, x, bias: torch.nn.functional.linear(x, layer.weight, bias),
    )
    torch.manual_seed(0)
    fp8 = [a_layer("norm")]
    if kind == "MLP":
        fp8 = [a_layer("norm", 2 * N, K), a_layer("activated", K, N)]
    layers: list[Any] = [a_module(one, 10**7 + number) for number, one in enumerate(fp8)]
    if kind == "MLP":
        layers[0].mixquant_method.following = layers[1]
    features = fp8[-1].features
    x, residual = torch.randn(2, 10, K).bfloat16(), torch.randn(2, 10, K).bfloat16()
    in_rows = {"none": None, "other rows": everything_quantized(19)}
    with in_force(in_rows.get(plan, everything_quantized(20))):
        if kind == "norm":
            out = torch.ops.mixquant.phase_linear(x, None, layers[0].mixquant_number, features)
        else:
            out, total = torch.ops.mixquant.phase_add_norm_linear(
                x, residual, layers[0].mixquant_number, features
            )
            assert torch.equal(total, x + residual)
    assert out.shape == (2, 10, features)
    added = None if kind == "norm" else residual
    wanted = reference(fp8, x, added, CODED if plan == "all" else 1)
    size = wanted.abs().max().item()
    torch.testing.assert_close(out.double(), wanted, rtol=0.02, atol=0.01 * size)
    # The layers behind the norm are given their own product.
    for layer in layers:
        assert layer.mixquant_method.apply(layer, out) is out


@pytest.mark.parametrize("role", ["all", "prefill"])
def test_what_is_launched_later_is_launched_at_start(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel in every variant that a pass of any kind needs, once for layers alike."""
    from mixquant.kernels.triton import few_rows as few_rows_triton
    from mixquant.kernels.triton import fused as fused_triton

    launched = set()

    def note(module: Any, name: str, describe: Any) -> None:
        does = getattr(module, name)

        def noted(*arguments: Any) -> Any:
            launched.add((name, *describe(*arguments)))
            return does(*arguments)

        monkeypatch.setattr(module, name, noted)

    def of_room(into: Any) -> tuple[Any, ...]:
        return into.codes.shape[1], into.precise is None

    note(fused_triton, "silu_and_mul", lambda x, into: of_room(into))
    note(fused_triton, "rms_norm", lambda x, added, w, e, into, t: (added is None, *of_room(into)))
    note(fused_triton, "precise_silu_and_mul", lambda x: (x.shape[1],))
    note(fused_triton, "precise_rms_norm", lambda x, added, *_: (added is None, x.shape[1]))
    note(
        few_rows_triton,
        "few_rows",
        lambda x, weight, out, of_x, of_out: (*weight.shape, of_x is None, of_out is None),
    )
    layers = [
        *(a_layer(kind) for kind in ("plain", "norm", "plain")),
        a_layer("norm", 2 * N, K),
        a_layer("activated", K, N),
    ]
    if role == "prefill":
        for layer in layers:
            layer.weight = layer.weight[:0]
    LOG.clear()
    fp8_layer.warm_up(layers, torch.device("cpu"))
    assert LOG.count("quantized") == (6 if role == "prefill" else 12)  # of four kinds, two normed
    at_start = set(launched)
    x, wide = torch.randn(40, K).bfloat16(), torch.randn(40, 2 * N).bfloat16()
    plans = [everything_quantized(40)]
    if role == "all":
        plans.append(plan_pass(Thresholds(), [99, 0, 0], [1, 19, 20], [99, 19, 20]))
    for plan in plans:
        for layer in layers:
            normed, given = layer.norm is not None, wide if layer.activated else x
            for added in (None, x) if normed else (None,):
                multiply(
                    [layer], given, added, plan, None if added is None else torch.empty_like(x)
                )
                if role == "all":
                    layer.precise_input(given, added, None)
    assert launched == at_start


def a_module(fp8: Fp8Layer, number: int) -> torch.nn.Module:
    layer, method = torch.nn.Module(), linear.PhaseLinearMethod.__new__(linear.PhaseLinearMethod)
    layer.weight = torch.nn.Parameter(fp8.weight, requires_grad=False)
    layer.mixquant_method = method
    method.shape, method.fp8, method.activated = (fp8.features, fp8.width), fp8, fp8.activated
    method.in_norm, method.only_quantized = True, False
    method.products = (((0, fp8.features), fp8.product),)
    layer.mixquant_number = torch.tensor(number)
    operator._layers[number] = layer
    return layer
