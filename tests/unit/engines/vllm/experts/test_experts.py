"""Experts in vLLM: which row goes where, and the arithmetic of the copies against stand-ins."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from example_counts import up_to
from hypothesis import event, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from one_rank import one_rank
from vllm import _custom_ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe import TritonOrCutlassExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)
from vllm.platforms import current_platform

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.second_checkpoint import SecondCheckpoint
from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.core.recipe import Recipe
from mixquant.core.summary import IGNORED, THE_RECIPE, Layer
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.config import PhaseQuantizationConfig
from mixquant.engines.vllm.experts import choose
from mixquant.engines.vllm.experts import fp8 as fp8_experts
from mixquant.engines.vllm.experts import method as experts
from mixquant.engines.vllm.experts import nvfp4 as experts_nvfp4
from mixquant.engines.vllm.experts.base import by_rows
from mixquant.engines.vllm.experts.choose import experts_method
from mixquant.engines.vllm.experts.fp8 import Fp8Experts, kernel_class
from mixquant.engines.vllm.experts.method import PhaseExpertsMethod
from mixquant.engines.vllm.experts.nvfp4 import Nvfp4Experts
from mixquant.engines.vllm.loading.memory import CopyDoesNotFit, Ledger
from mixquant.engines.vllm.loading.online import CannotReload
from mixquant.engines.vllm.patches import runners as passes
from mixquant.engines.vllm.products.base import nbytes_of
from mixquant.formats import EMULATION, fp8, nvfp4, nvfp4_blocks
from mixquant.formats.nvfp4 import NVFP4

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build")

EXPERTS = 4
TOP_K = 2
PREFIX = "model.layers.0.mlp.experts"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def routed(rows: int, seed: int = 0, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """The router's weights, FP32, and the experts that it chose, int32."""
    scores = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    weights, ids = scores.topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).contiguous(), ids.int().contiguous()


def parallel(**changes: Any) -> FusedMoEParallelConfig:
    return dataclasses.replace(FusedMoEParallelConfig.make_no_parallel(), **changes)


def moe_config(n: int = 64, k: int = 128, **changes: Any) -> FusedMoEConfig:
    values = {
        "num_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "hidden_dim": k,
        "intermediate_size": n,
        "num_local_experts": EXPERTS,
        "num_logical_experts": EXPERTS,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": parallel(),
        "in_dtype": torch.bfloat16,
    }
    return FusedMoEConfig(**{**values, **changes})


def layer_of(moe: FusedMoEConfig, kind: Any = RoutedExperts, **attributes: Any) -> Any:
    """A layer as get_quant_method gets it: before it has weights."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    values = {
        "moe_config": moe,
        "layer_name": PREFIX,
        "activation": moe.activation,
        "params_dtype": torch.bfloat16,
        "global_num_experts": moe.num_experts,
        "apply_router_weight_on_input": False,
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
        "rocm_aiter_fmoe_enabled": False,
        "_expert_map": None,
    }
    for name, value in {**values, **attributes}.items():
        setattr(layer, name, value)
    return layer


def with_weights(moe: FusedMoEConfig, seed: int = 0, **attributes: Any) -> Any:
    layer = layer_of(moe, **attributes)
    n, k = moe.intermediate_size_per_partition, moe.hidden_dim
    for name, shape in (("w13_weight", (2 * n, k)), ("w2_weight", (k, n))):
        # Each expert with magnitudes of its own.
        weight = random(moe.num_experts, *shape, seed=seed) * 0.1
        weight *= 2.0 ** torch.arange(moe.num_experts).view(-1, 1, 1) / 4
        setattr(layer, name, nn.Parameter(weight, requires_grad=False))
        seed += 1
    return layer


def rows_of(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


# --- which row goes where ----------------------------------------------------------------------------

WIDTH = 6


def check_by_rows(plan: PhasePlan) -> str:
    """Every row through its function, with its own router's words; the way that was taken."""
    precise, quantized = rows_of(plan.precise), rows_of(plan.quantized)
    padding = sorted(set(range(plan.rows)) - {*precise, *quantized})
    x = torch.arange(plan.rows * WIDTH, dtype=torch.float32).view(plan.rows, WIDTH)
    numbers = torch.arange(plan.rows)
    weights = (1 + numbers.view(-1, 1) + torch.tensor([0.0, 0.5])).contiguous()
    ids = (numbers.view(-1, 1) * 2 + torch.tensor([0, 1])).int()
    x[padding] = torch.nan
    ids[padding] = -1  # as vLLM's router has it
    before = x.clone()
    seen: dict[str, list[int]] = {}

    def function(name: str, sign: float) -> Callable[..., Tensor]:
        def run(x: Tensor, weights: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
            assert name not in seen, "called twice"
            seen[name] = numbers.tolist()
            for tensor in (x, weights, ids, numbers):
                assert len(tensor) == len(x) > 0
                assert tensor.is_contiguous()
            assert (ids >= 0).all()
            return sign * (x + 1000 * weights[:, :1] + 7 * weights[:, 1:] + 3 * ids[:, 1:])

        return run

    of_rows = (x, weights, ids, numbers)
    out = by_rows(plan, of_rows, function("precise", 1.0), function("quantized", -1.0))
    assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
    wanted = x + 1000 * weights[:, :1] + 7 * weights[:, 1:] + 3 * ids[:, 1:]
    assert torch.equal(out[precise], wanted[precise])
    assert torch.equal(out[quantized], -wanted[quantized])
    assert (out[padding] == 0).all()
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert seen.get("precise", []) == precise
    if seen["quantized"] == quantized:
        return "gathered" if precise else "all"
    assert seen["quantized"] == sorted(precise + quantized)
    assert len(precise) <= plan.rows / 8
    assert seen["quantized"] == list(range(len(seen["quantized"])))
    return "overwritten"


def plan_of(
    sequences: list[tuple[int, int, int]], padding: int = 0, thresholds: Thresholds | None = None
) -> PhasePlan:
    """Of sequences (first position, rows, length of the prompt), with padding at the end."""
    table = np.array([*sequences, (-padding, padding, 0)])
    return plan_pass(thresholds or Thresholds(), table[:, 0], table[:, 1], table[:, 2])


SEQUENCES = st.lists(
    # A negative position: padding comes before the sequence.
    st.tuples(st.integers(-3, 30), st.integers(1, 40), st.integers(1, 60)),
    min_size=1,
    max_size=5,
)


@given(
    sequences=SEQUENCES, padding=st.integers(0, 8), head=st.integers(0, 4), tail=st.integers(0, 3)
)
@example(sequences=[(0, 40, 41)], padding=0, head=0, tail=1)
@example(sequences=[(0, 40, 41)], padding=5, head=0, tail=1)
@example(sequences=[(0, 40, 40)], padding=5, head=2, tail=1)
@example(sequences=[(0, 20, 20), (9, 1, 9), (0, 20, 20)], padding=0, head=0, tail=1)
@example(sequences=[(-3, 30, 30), (-2, 30, 30)], padding=0, head=0, tail=1)
@hypothesis_settings(deadline=None, max_examples=up_to(150))
def test_each_row_goes_through_its_function(
    sequences: list[tuple[int, int, int]], padding: int, head: int, tail: int
) -> None:
    plan = plan_of(sequences, padding, Thresholds(0, head, tail))
    if plan.quantized:  # by_rows is for plans with quantized rows
        event(check_by_rows(plan))


@pytest.mark.parametrize(
    ("plan", "way"),
    [
        (everything_quantized(9), "all"),
        (plan_of([(0, 32, 32)]), "overwritten"),
        (plan_of([(0, 32, 32)], 5), "overwritten"),
        (plan_of([(0, 20, 20), (0, 20, 20)]), "overwritten"),
        (plan_of([(0, 8, 8)]), "overwritten"),  # an eighth
        (plan_of([(0, 7, 7)]), "gathered"),
        (plan_of([(0, 20, 20), (50, 5, 9)], 3), "gathered"),
        (plan_of([(50, 5, 9), (0, 20, 20), (0, 20, 20)]), "gathered"),
        (plan_of([(-2, 40, 38)]), "gathered"),  # padding in front: nothing to slice off
        (plan_of([(0, 20, 20), (-2, 20, 18)]), "gathered"),
    ],
)
def test_few_precise_rows_are_overwritten_and_many_are_spared(plan: PhasePlan, way: str) -> None:
    assert check_by_rows(plan) == way


def test_consecutive_rows_are_not_copied() -> None:
    plan = plan_of([(0, 5, 9), (20, 5, 9)])
    assert (plan.quantized, plan.precise) == (((0, 5),), ((5, 10),))
    x = random(10, 4)
    handed: list[int] = []

    def function(x: Tensor) -> Tensor:
        handed.append(x.data_ptr())
        return x.clone()

    assert torch.equal(by_rows(plan, (x,), function, function), x)
    assert handed == [x.data_ptr(), x[5:].data_ptr()]


# --- the method --------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's method without its choice of a kernel, and no shape that is warm."""
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod, "__init__", lambda self, moe: nn.Module.__init__(self)
    )
    monkeypatch.setattr(experts, "_warmed", set())


class Copy:
    """A quantized copy that remembers what it was given: minus the sum of what belongs to a row."""

    kernel = "a kernel"
    nbytes = 123

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        self.error: Exception | None = None

    def load(self, layer: Any) -> None:
        self.loaded = layer.w13_weight.detach().clone(), layer.w2_weight.detach().clone()

    def __call__(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        assert (ids >= 0).all()
        self.calls.append((layer, x, weights, ids))
        return -stock_result(x, weights, ids)


def stock_result(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return x + (weights * ids).sum(-1, keepdim=True).to(x.dtype)


def method_of(shape: tuple[int, ...] = (EXPERTS, 128, 128), fmt: str = "fp8") -> Any:
    method = PhaseExpertsMethod(SimpleNamespace(), fmt, PREFIX, Ledger())
    method.shape = shape
    method.quantized = Copy()
    return method


@pytest.fixture
def stock(bare: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What vLLM's own `apply` was called with."""
    calls: list[tuple[Any, ...]] = []
    signature = inspect.signature(UnquantizedFusedMoEMethod.apply)

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        calls.append(tuple(given.values())[1:])
        return stock_result(given["x"], given["topk_weights"], given["topk_ids"])

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply", apply)
    return calls


@pytest.fixture
def monolithic(bare: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    signature = inspect.signature(UnquantizedFusedMoEMethod.apply_monolithic)

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        calls.append(tuple(given.arguments.values())[1:])
        return given.arguments["x"] + given.arguments["router_logits"].sum(-1, keepdim=True)

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply_monolithic", apply)
    return calls


PRECISE_PLANS = {
    "no plan": None,
    "another row count": everything_quantized(39),
    "nothing quantized": plan_of([(50, 40, 9)]),
}


def test_the_methods_take_what_vllms_take() -> None:
    for name in ("apply", "apply_monolithic"):
        ours, theirs = (
            inspect.signature(getattr(cls, name))
            for cls in (PhaseExpertsMethod, UnquantizedFusedMoEMethod)
        )
        for (mine, its), (other, others) in zip(
            ours.parameters.items(), theirs.parameters.items(), strict=True
        ):
            assert (mine, its.kind, its.default) == (other, others.kind, others.default)


@pytest.mark.parametrize("plan", PRECISE_PLANS.values(), ids=list(PRECISE_PLANS))
def test_without_quantized_rows_the_call_is_vllms_own(
    plan: PhasePlan | None, stock: list[tuple[Any, ...]]
) -> None:
    method = method_of()
    given: dict[str, Any] = {
        "layer": object(),
        "x": random(40, 8),
        "topk_weights": routed(40)[0],
        "topk_ids": routed(40)[1],
        "shared_experts": object(),
        "shared_experts_input": random(40, 8),
    }
    with in_force(plan):
        out = method.apply(**given)
    assert len(stock) == 1 and not method.quantized.calls
    assert all(a is b for a, b in zip(stock[0], given.values(), strict=True))
    assert torch.equal(out, stock_result(given["x"], given["topk_weights"], given["topk_ids"]))
    assert not method._warm and not experts._warmed


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("decodes", [1, 30])
def test_with_quantized_rows(padding: int, decodes: int, stock: list[tuple[Any, ...]]) -> None:
    """The shared experts, which vLLM runs around this call, go to neither kernel."""
    method, layer = method_of(), object()
    plan = plan_of([(0, 40, 40), (60, decodes, 9)], padding)
    x, (weights, ids) = random(plan.rows, 8), routed(plan.rows)
    ids[plan.rows - padding :] = -1
    with in_force(plan):
        out = method.apply(layer, x, weights, ids, object(), random(plan.rows, 8))
    wanted = stock_result(x, weights, ids)
    precise, quantized = rows_of(plan.precise), rows_of(plan.quantized)
    assert quantized == list(range(39))
    assert torch.equal(out[precise], wanted[precise])
    assert torch.equal(out[quantized], -wanted[quantized])
    assert (out[plan.rows - padding :] == 0).all()
    ((of, seen, *_, shared, shared_input),) = stock
    assert of is layer and torch.equal(seen, x[precise])
    assert shared is None and shared_input is None
    assert method.quantized.calls[0][0] is layer


def test_everything_quantized_calls_no_precise_kernel(stock: list[tuple[Any, ...]]) -> None:
    method, x, (weights, ids) = method_of(), random(40, 8), routed(40)
    with in_force(everything_quantized(40)):
        out = method.apply(object(), x, weights, ids, None, None)
    assert torch.equal(out, -stock_result(x, weights, ids))
    assert not stock and len(method.quantized.calls) == 1


def test_warm_up_runs_once_per_shape(stock: list[tuple[Any, ...]]) -> None:
    plan = plan_of([(0, 597, 597)], 3)
    x, (weights, ids) = random(600, 8), routed(600)
    ids[:2] = -1  # as in a profiling pass, whose rows may all be padding; the plan knows better
    plan = PhasePlan(600, ((2, 597),), ())

    def rows(method: Any) -> list[int]:
        method.quantized.calls.clear()
        with in_force(plan):
            method.apply(object(), x, weights, ids, None, None)
        return [len(x) for _, x, _, _ in method.quantized.calls]

    first, second = method_of(), method_of()
    assert rows(first) == [256, 512, 595]
    assert rows(first) == [595]
    assert rows(second) == [595]
    assert rows(method_of(shape=(EXPERTS, 256, 128))) == [256, 512, 595]
    assert rows(method_of(fmt="nvfp4")) == [256, 512, 595]
    assert not stock  # BF16 is compiled by vLLM's own profiling pass


def test_what_is_precise_warms_nothing_up(stock: list[tuple[Any, ...]]) -> None:
    method = method_of()
    x, (weights, ids) = random(300, 8), routed(300)
    method.apply(object(), x, weights, ids, None, None)
    assert not method.quantized.calls
    with in_force(everything_quantized(300)):
        method.apply(object(), x, weights, ids, None, None)
    assert [len(x) for _, x, _, _ in method.quantized.calls] == [256, 300]


def test_errors_of_the_kernel_are_not_swallowed(stock: list[tuple[Any, ...]]) -> None:
    """Nor answered with BF16: what was not quantized must not look as if it had been."""
    method = method_of()
    x, (weights, ids) = random(300, 8), routed(300)
    method.quantized.error = RuntimeError("out of memory")
    for _ in range(2):  # in the warm-up, and after it
        with in_force(plan_of([(0, 300, 300)])), pytest.raises(RuntimeError, match="of memory"):
            method.apply(object(), x, weights, ids, None, None)
    assert not stock
    method.quantized.error = None
    with in_force(plan_of([(0, 300, 300)])):
        out = method.apply(object(), x, weights, ids, None, None)
    assert torch.equal(out[:299], -stock_result(x, weights, ids)[:299])


class Router:
    """Routes as vLLM's would, if it is asked as vLLM's is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        context = SimpleNamespace(no_compile_layers={PREFIX: SimpleNamespace(router=self)})
        monkeypatch.setattr(experts, "get_forward_context", lambda: context)

    def select_experts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = inspect.signature(FusedMoERouter.select_experts).bind(self, *args, **kwargs)
        self.asked.append(given.arguments["input_ids"])
        assert len(given.arguments["hidden_states"]) == len(given.arguments["router_logits"])
        weights, ids = given.arguments["router_logits"].float().softmax(-1).topk(TOP_K, dim=-1)
        return weights, ids.int()


@pytest.mark.parametrize("plan", PRECISE_PLANS.values(), ids=list(PRECISE_PLANS))
@pytest.mark.parametrize("with_ids", [False, True])
def test_monolithic_without_quantized_rows(
    plan: PhasePlan | None,
    with_ids: bool,
    monolithic: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, router, layer = method_of(), Router(monkeypatch), SimpleNamespace(layer_name=PREFIX)
    x, logits = random(40, 8), random(40, EXPERTS)
    more = {"input_ids": torch.arange(40)} if with_ids else {}
    with in_force(plan):
        method.apply_monolithic(layer=layer, x=x, router_logits=logits, **more)
    ((of, seen, its_logits, its_ids),) = monolithic
    assert of is layer and seen is x and its_logits is logits and its_ids is more.get("input_ids")
    assert not router.asked and not method.quantized.calls


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("decodes", [1, 30])
def test_monolithic_with_quantized_rows(
    decodes: int,
    with_ids: bool,
    monolithic: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, router, layer = method_of(), Router(monkeypatch), SimpleNamespace(layer_name=PREFIX)
    method._warm = True
    plan = plan_of([(0, 40, 40), (60, decodes, 9)], 2)
    x, logits = random(plan.rows, 8), random(plan.rows, EXPERTS, seed=1)
    tokens = torch.arange(plan.rows) if with_ids else None
    with in_force(plan):
        out = method.apply_monolithic(layer, x, logits, tokens)
    precise, quantized = rows_of(plan.precise), rows_of(plan.quantized)
    weights, ids = logits.float().softmax(-1).topk(TOP_K, dim=-1)
    assert torch.equal(out[quantized], -stock_result(x, weights, ids)[quantized])
    assert torch.equal(out[precise], (x + logits.sum(-1, keepdim=True))[precise])
    assert (out[-2:] == 0).all()
    ((_, seen, its_logits, its_tokens),) = monolithic
    assert torch.equal(seen, x[precise]) and torch.equal(its_logits, logits[precise])
    assert its_tokens is None if tokens is None else torch.equal(its_tokens, tokens[precise])
    assert len(router.asked) == 1 and router.asked[0] is tokens


def test_monolithic_warms_up_as_well(
    monolithic: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, layer = method_of(), SimpleNamespace(layer_name=PREFIX)
    Router(monkeypatch)
    with in_force(everything_quantized(300)):
        method.apply_monolithic(layer, random(300, 8), random(300, EXPERTS))
    assert [len(x) for _, x, _, _ in method.quantized.calls] == [256, 300]
    assert not monolithic


# --- weights -----------------------------------------------------------------------------------------


def created(method: PhaseExpertsMethod, moe: FusedMoEConfig, **attributes: Any) -> Any:
    method.moe = moe
    layer = layer_of(moe)
    n, k = moe.intermediate_size_per_partition, moe.hidden_dim
    method.create_weights(
        layer,
        num_experts=EXPERTS,
        hidden_size=k,
        intermediate_size_per_partition=n,
        params_dtype=torch.bfloat16,
        **attributes,
    )
    return layer


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_the_ledger_hears_of_the_copy_and_the_table_of_the_layer(fmt: str, bare: None) -> None:
    method = PhaseExpertsMethod(SimpleNamespace(), fmt, PREFIX, Ledger())
    moe = moe_config(64, 256)
    layer = created(method, moe)
    assert layer.w13_weight.shape == (EXPERTS, 128, 256)
    assert layer.w2_weight.shape == (EXPERTS, 256, 64)
    copy = EXPERTS * (nbytes_of(fmt, 128, 256) + nbytes_of(fmt, 256, 64))
    assert method.ledger._copies == {PREFIX: copy}
    assert method.ledger._weights == {PREFIX: EXPERTS * (128 * 256 + 256 * 64) * 2}
    method.quantized = Copy()
    assert method.described("a.experts") == [
        Layer("a.experts", (EXPERTS, 128, 256), fmt, "a kernel", True, 123, None)
    ]
    assert not method.supports_eplb


def test_a_copy_that_does_not_fit(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixquant.engines.vllm.loading.memory._free", lambda device, before: 1000.0)
    monkeypatch.setattr("mixquant.engines.vllm.loading.memory._layer_count", lambda: 1)
    method = PhaseExpertsMethod(SimpleNamespace(), "fp8", PREFIX, Ledger())
    with pytest.raises(CopyDoesNotFit, match=r"experts.*tensor-parallel-size"):
        created(method, moe_config())


def test_the_copy_is_made_before_vllm_rearranges_the_weights(
    bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, when weights are loaded anew, into the same storage."""

    def rearrange(self: Any, layer: Any) -> None:
        layer.w13_weight.data = layer.w13_weight.data.flip(1)

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", rearrange)
    made: list[Copy] = []
    monkeypatch.setattr(
        experts,
        "_quantized_experts",
        lambda layer, fmt, block_scale: made.append(Copy()) or made[-1],  # type: ignore[func-returns-value]
    )
    method = PhaseExpertsMethod(SimpleNamespace(), "fp8", PREFIX, Ledger())
    for seed in range(2):
        layer = with_weights(moe_config(), seed=seed)
        loaded = layer.w13_weight.detach().clone(), layer.w2_weight.detach().clone()
        method.process_weights_after_loading(layer)
        held: Any = method.quantized
        assert len(made) == 1 and held is made[0]
        assert all(torch.equal(a, b) for a, b in zip(made[0].loaded, loaded, strict=True))
        assert torch.equal(layer.w13_weight, loaded[0].flip(1))
    # The method is a child of the layer, whose parameters a checkpoint has to fill.
    assert not list(method.parameters()) and not list(method.buffers())


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_a_prefill_engine_gives_the_experts_back_when_the_last_was_read(
    fmt: str, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod,
        "process_weights_after_loading",
        lambda self, layer: seen.append(layer.w13_weight.shape),
    )
    monkeypatch.setattr(experts, "_quantized_experts", lambda layer, fmt, block_scale: Copy())
    method = PhaseExpertsMethod(SimpleNamespace(), fmt, PREFIX, Ledger(), only_quantized=True)
    moe = moe_config(64, 128)
    loader = {"weight_loader": lambda param, loaded, expert: param.data[expert].copy_(loaded)}
    layer = created(method, moe, **loader)
    layer.quant_method = method
    copy = EXPERTS * (nbytes_of(fmt, 128, 128) + nbytes_of(fmt, 128, 64))
    assert (method.ledger._copies, method.ledger._weights) == ({PREFIX: copy}, {PREFIX: 0})
    assert layer.w13_weight.is_meta and layer.w2_weight.is_meta
    assert method.uses_meta_device

    w13, w2 = random(EXPERTS, 128, 128), random(EXPERTS, 128, 64, seed=1)
    for expert in reversed(range(EXPERTS)):
        assert method.quantized is None
        layer.w2_weight.weight_loader(layer.w2_weight, w2[expert], expert)
        layer.w13_weight.weight_loader(layer.w13_weight, w13[expert], expert)
    assert torch.equal(method.quantized.loaded[0], w13)
    assert torch.equal(method.quantized.loaded[1], w2)
    assert seen == [(EXPERTS, 128, 128)]  # vLLM's own set-up, with the weights there
    assert layer.w13_weight.numel() == layer.w2_weight.numel() == 0
    assert len(layer.w13_weight) == EXPERTS
    (line,) = method.described("a.experts")
    assert line.freed == EXPERTS * (128 * 128 + 128 * 64) * 2
    method.process_weights_after_loading(layer)  # vLLM comes by once more
    assert len(seen) == 1
    del layer._already_called_process_weights_after_loading  # a reload
    with pytest.raises(CannotReload, match="restart"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("plan", PRECISE_PLANS.values(), ids=list(PRECISE_PLANS))
def test_in_a_prefill_engine_every_row_takes_the_copy(
    plan: PhasePlan | None, stock: list[tuple[Any, ...]]
) -> None:
    """Padding rows, which have no expert, among them: graphs are captured with all rows."""
    method = method_of()
    method.only_quantized = True
    x, (weights, ids) = random(40, 8), routed(40)
    ids[37:] = -1
    with in_force(plan):
        out = method.apply(object(), x, weights, ids, None, None)
    assert torch.equal(out[:37], -stock_result(x, weights, ids)[:37])
    assert not stock


def test_an_empty_pass_in_a_prefill_engine_asks_no_kernel(
    stock: list[tuple[Any, ...]], monolithic: list[tuple[Any, ...]]
) -> None:
    """Its BF16 experts are gone, and a pass without rows has none that is quantized."""
    method = method_of()
    method.only_quantized = True
    x, (weights, ids) = random(0, 8), routed(0)
    for plan in (None, everything_quantized(0)):
        with in_force(plan):
            assert method.apply(object(), x, weights, ids, None, None).shape == (0, 8)
            out = method.apply_monolithic(object(), x, random(0, EXPERTS))
            assert out.shape == (0, 8)
    assert not stock and not monolithic and not method.quantized.calls


def test_experts_that_were_written_to_where_they_are_are_refused(
    bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod,
        "process_weights_after_loading",
        lambda self, layer: layer.w13_weight.data.copy_(layer.w13_weight.data.flip(1)),
    )
    monkeypatch.setattr(experts, "_quantized_experts", lambda layer, fmt, block_scale: Copy())
    method = PhaseExpertsMethod(SimpleNamespace(), "fp8", PREFIX, Ledger())
    layer = with_weights(moe_config())
    method.renew(layer)  # not loaded yet
    method.process_weights_after_loading(layer)
    method.renew(layer)  # as a kernel wants it, and as it was
    layer.w2_weight.data[1] += 1
    with pytest.raises(CannotReload, match="reload_weights") as caught:
        method.renew(layer)
    assert "\n" not in str(caught.value)


def test_a_prefill_engine_asks_the_router_where_vllms_kernel_would_route(
    monolithic: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, router = method_of(), Router(monkeypatch)
    method.only_quantized = True
    x, logits = random(40, 8), random(40, EXPERTS)
    out = method.apply_monolithic(SimpleNamespace(layer_name=PREFIX), x, logits)
    weights, ids = logits.float().softmax(-1).topk(TOP_K, dim=-1)
    assert torch.equal(out, -stock_result(x, weights, ids))
    assert not monolithic and router.asked


def test_padding_of_the_intermediate_size_is_zero_in_the_copy(
    bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod, "process_weights_after_loading", lambda self, layer: None
    )
    monkeypatch.setattr(experts, "_quantized_experts", lambda layer, fmt, block_scale: Copy())
    moe = moe_config(128)
    layer = with_weights(moe)
    moe.intermediate_size_per_partition_unpadded = 96
    layer.w13_weight.data[:, 96:128] = torch.nan  # never written to
    layer.w13_weight.data[:, 224:] = torch.nan
    layer.w2_weight.data[:, :, 96:] = torch.nan
    wanted13, wanted2 = layer.w13_weight.nan_to_num(), layer.w2_weight.nan_to_num()
    method = PhaseExpertsMethod(SimpleNamespace(), "fp8", PREFIX, Ledger())
    method.process_weights_after_loading(layer)
    assert torch.equal(method.quantized.loaded[0], wanted13)
    assert torch.equal(method.quantized.loaded[1], wanted2)


# --- NVFP4 -------------------------------------------------------------------------------------------

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def positions(rows: int, columns: int) -> Tensor:
    """Where the block scales of a matrix lie, as vLLM's kernels compute it
    (``cvt_quant_to_fp4_get_sf_out_offset``)."""
    m, k = torch.arange(rows).view(-1, 1), torch.arange(columns).view(1, -1)
    tile = m // 128 * (-(-columns // 4)) + k // 4
    return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4


def multiplied(codes: Tensor, scales: Tensor) -> Tensor:
    """What packed codes ``[M, K/2]`` and scales ``[M, K/16]`` stand for, exactly."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    values = _E2M1[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    return values * scales.double().repeat_interleave(16, dim=1)


def is_int32(tensor: Tensor, *shape: int) -> None:
    assert (tensor.dtype, tensor.shape) == (torch.int32, shape)
    assert tensor.is_contiguous()


class Cutlass:
    """vLLM's operators for NVFP4 experts in PyTorch.

    With the checks of the kernels (csrc/libtorch_stable of 0.25.1), and with what they leave
    undefined undefined: unwritten memory is NaN, and the order of rows within an expert arbitrary.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        for name in (
            "get_cutlass_moe_mm_data",
            "scaled_fp4_experts_quant",
            "cutlass_fp4_moe_mm",
            "shuffle_rows",
        ):
            setattr(self, name, self._called_as_vllm(name))

    def _called_as_vllm(self, name: str) -> Callable[..., Any]:
        signature = inspect.signature(getattr(_custom_ops, name))

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            return getattr(self, f"_{name}")(**given.arguments)

        return call

    def _get_cutlass_moe_mm_data(
        self,
        topk_ids: Tensor,
        expert_offsets: Tensor,
        problem_sizes1: Tensor,
        problem_sizes2: Tensor,
        input_permutation: Tensor,
        output_permutation: Tensor,
        num_experts: int,
        n: int,
        k: int,
        blockscale_offsets: Tensor,
        is_gated: bool,
    ) -> None:
        rows, top_k = topk_ids.shape
        is_int32(topk_ids, rows, top_k)
        for offsets in (expert_offsets, blockscale_offsets):
            is_int32(offsets, num_experts + 1)
        for sizes in (problem_sizes1, problem_sizes2):
            is_int32(sizes, num_experts, 3)
        for permutation in (input_permutation, output_permutation):
            is_int32(permutation, rows * top_k)
            permutation.fill_(2**30)
        assert ((topk_ids >= 0) & (topk_ids < num_experts)).all()  # -1 leaves rows undefined
        flat, at, at_scale = topk_ids.flatten(), 0, 0
        expert_offsets[0] = blockscale_offsets[0] = 0
        for expert in range(num_experts):
            chosen = (flat == expert).nonzero().flatten()
            chosen = chosen[torch.randperm(len(chosen), generator=self.generator)]
            input_permutation[at : at + len(chosen)] = (chosen // top_k).int()
            output_permutation[chosen] = torch.arange(at, at + len(chosen)).int()
            first = (len(chosen), (2 if is_gated else 1) * n, k)
            problem_sizes1[expert] = torch.tensor(first)
            problem_sizes2[expert] = torch.tensor((len(chosen), k, n))
            at += len(chosen)
            at_scale += -(-len(chosen) // 128) * 128
            expert_offsets[expert + 1] = at
            blockscale_offsets[expert + 1] = at_scale

    def _scaled_fp4_experts_quant(
        self,
        input_tensor: Tensor,
        input_global_scale: Tensor,
        expert_offsets: Tensor,
        blockscale_offsets: Tensor,
        topk: int,
    ) -> tuple[Tensor, Tensor]:
        rows, k = input_tensor.shape
        count = len(input_global_scale)
        assert input_tensor.dtype == torch.bfloat16 and input_tensor.is_contiguous()
        assert input_global_scale.dtype == torch.float32 and input_global_scale.ndim == 1
        is_int32(expert_offsets, count + 1)
        is_int32(blockscale_offsets, count + 1)
        assert rows % topk == 0 and k % 16 == 0 and expert_offsets[-1] == rows
        columns = -(-(k // 16) // 4) * 4
        codes = torch.full((rows, k // 2), 255, dtype=torch.uint8)
        # As many rows as the most tokens there can be: more than are written.
        scales = torch.full((int(blockscale_offsets[-1]) + 128, columns), 127, dtype=torch.uint8)
        for expert in range(count):
            start, stop = expert_offsets[expert : expert + 2].tolist()
            if start == stop:
                continue
            values, of_blocks = ref_nvfp4_quant(
                input_tensor[start:stop], input_global_scale[expert], 16
            )
            index = torch.searchsorted(_E2M1, values.abs().double())
            nibbles = (index | (values.signbit().long() << 3)).to(torch.uint8)
            codes[start:stop] = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
            place = int(blockscale_offsets[expert]) * columns + positions(stop - start, k // 16)
            scales.view(-1)[place] = of_blocks.to(torch.float8_e4m3fn).view(torch.uint8)
        return codes, scales.view(torch.float8_e4m3fn)

    def _cutlass_fp4_moe_mm(
        self,
        out_tensors: Tensor,
        a_tensors: Tensor,
        b_tensors: Tensor,
        a_scales: Tensor,
        b_scales: Tensor,
        alphas: Tensor,
        problem_sizes: Tensor,
        expert_offsets: Tensor,
        sf_offsets: Tensor,
    ) -> None:
        count, n, half_k = b_tensors.shape
        k = 2 * half_k
        for codes in (a_tensors, b_tensors):
            assert codes.dtype == torch.uint8 and codes.is_contiguous()
        for scales, dimensions in ((a_scales, 2), (b_scales, 3)):
            assert scales.dtype == torch.float8_e4m3fn and scales.is_contiguous()
            assert scales.ndim == dimensions
        assert (alphas.dtype, alphas.shape) == (torch.float32, (count,)) and alphas.is_contiguous()
        is_int32(problem_sizes, count, 3)
        is_int32(expert_offsets, count)
        is_int32(sf_offsets, count)
        # The one type of output that there is on SM120.
        assert out_tensors.dtype == torch.bfloat16 and out_tensors.is_contiguous()
        assert a_tensors.shape[1] == half_k and out_tensors.shape == (len(a_tensors), n)
        assert b_scales.shape == (count, n, k // 16)
        # The kernels ask for addresses at multiples of 128, and step over whole tiles of scales.
        assert k // 16 % 4 == 0 and n % 128 == 0
        out_tensors.fill_(torch.nan)
        for expert in range(count):
            rows, features, columns = problem_sizes[expert].tolist()
            assert (features, columns) == (n, k)
            if rows == 0:
                continue
            start = int(expert_offsets[expert])
            at = int(sf_offsets[expert]) * (k // 16)
            a_of_rows = a_scales.reshape(-1)[at + positions(rows, k // 16)]
            of_features = b_scales.reshape(-1)[expert * n * (k // 16) + positions(n, k // 16)]
            a = multiplied(a_tensors[start : start + rows], a_of_rows)
            b = multiplied(b_tensors[expert], of_features)
            # Sums in FP64 are exact here, so their order is of no account.
            product = (a @ b.T).float() * alphas[expert]
            out_tensors[start : start + rows] = product.to(out_tensors.dtype)

    def _shuffle_rows(self, input_tensor: Tensor, dst2src_map: Tensor) -> Tensor:
        is_int32(dst2src_map, len(dst2src_map))
        assert input_tensor.ndim == 2 and input_tensor.is_contiguous()
        assert input_tensor.shape[1] % (16 // input_tensor.element_size()) == 0
        assert ((dst2src_map >= 0) & (dst2src_map < len(input_tensor))).all()
        return input_tensor[dst2src_map.long()]


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_nvfp4, "ops", Cutlass())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # in vLLM's swizzle_blockscale
    # Exact sums in the reference as well: one bit in a hidden value may move an FP4 code.
    monkeypatch.setattr(
        nvfp4, "_matmul_fp32", lambda a, b: (a.double() @ b.double().T).float(), raising=True
    )


def loaded(layer: Any) -> Nvfp4Experts:
    copy = Nvfp4Experts(layer)
    copy.load(layer)
    return copy


def product(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    held = NVFP4.quantize_weight(weight, EMULATION)
    NVFP4.linear(NVFP4.quantize_rows(x, EMULATION), held, None, out)
    return out


def reference(layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert of every row by this project's own format."""
    by_expert = []
    for w13, w2 in zip(layer.w13_weight.data, layer.w2_weight.data, strict=True):
        gate_up = product(x, w13)
        hidden = gate_up.new_empty(len(x), gate_up.shape[1] // 2)
        apply_moe_activation(layer.activation, hidden, gate_up)
        by_expert.append(product(hidden, w2))
    results = torch.stack(by_expert, dim=1).float()
    chosen = results.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return (chosen * weights.bfloat16().float().unsqueeze(-1)).sum(1).to(x.dtype)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of a sum over chosen experts, rounded to BF16 in the end."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0, equal_nan=True)
    assert ((found == wanted) | wanted.isnan()).float().mean() > 0.99


@on_cpu
def test_the_activation_takes_the_gate_first() -> None:
    x = random(3, 64)
    out = x.new_empty(3, 32)
    apply_moe_activation(MoEActivation.SILU, out, x)
    wanted = torch.nn.functional.silu(x[:, :32].float()) * x[:, 32:].float()
    torch.testing.assert_close(out.float(), wanted, rtol=2**-6, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 128), (64, 256), (128, 256)])
def test_nvfp4_experts_are_the_sum_over_the_chosen(
    rows: int, n: int, k: int, cutlass: None
) -> None:
    layer = with_weights(moe_config(n, k))
    x, (weights, ids) = random(rows, k, seed=n + k + rows), routed(rows, seed=rows)
    before = x.clone(), weights.clone(), ids.clone()
    out = loaded(layer)(layer, x, weights, ids)
    assert_same(out, reference(layer, x, weights, ids))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weights, ids), strict=True))
    # Not only self-consistent: near to BF16's, as near as 4 bits are.
    exact = torch.zeros(rows, k)
    for choice in range(TOP_K):
        for row in range(rows):
            expert = int(ids[row, choice])
            gate, up = (x[row].float() @ layer.w13_weight[expert].float().T).split(n)
            hidden = torch.nn.functional.silu(gate) * up
            exact[row] += weights[row, choice] * (hidden @ layer.w2_weight[expert].float().T)
    error = (out.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.02 < error.mean() < 0.3


@on_cpu
@pytest.mark.parametrize(
    "activation", [MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH]
)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
def test_nvfp4_experts_of_other_kinds(
    activation: MoEActivation, top_k: int, ids_type: torch.dtype, cutlass: None
) -> None:
    layer = with_weights(moe_config(activation=activation, experts_per_token=top_k))
    x, (weights, ids) = random(11, 128), routed(11, top_k=top_k)
    out = loaded(layer)(layer, x, weights, ids.to(ids_type))
    assert_same(out, reference(layer, x, weights, ids))


@on_cpu
def test_what_sleep_throws_away_is_made_again_with_the_copy(cutlass: None) -> None:
    """Level 2 discards all memory of the weights, what was made beside them included."""
    layer, (weights, ids), x = with_weights(moe_config()), routed(5), random(5, 128)
    copy = loaded(layer)
    wanted = copy(layer, x, weights, ids)
    for tensor in (*copy.w13, *copy.w2, copy.ones):
        tensor.view(torch.uint8).zero_()
    copy.load(layer)
    assert torch.equal(copy(layer, x, weights, ids), wanted)
    assert (copy.ones == 1).all()


def test_what_sleep_throws_away_is_made_again_with_what_is_taken(
    second: Any, on_blackwell: None, cutlass: None
) -> None:
    layer = with_weights(moe_config(FEATURES, WIDE))
    second(Second("nvfp4", NAMES[0], layer))
    copy = Nvfp4Experts(layer)
    method = method_for(layer, "nvfp4")
    taken(method, layer, copy)
    made = [tensor.clone() for tensor in (*copy.w13, *copy.w2, copy.ones)]
    for tensor in (*copy.w13, *copy.w2, copy.ones):
        tensor.view(torch.uint8).zero_()
    taken(method, layer, copy)
    for before, after in zip(made, (*copy.w13, *copy.w2, copy.ones), strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


@on_cpu
@pytest.mark.parametrize("chosen", [(0, 1), (3, 0), (2, 3)])
def test_nvfp4_experts_without_a_row(chosen: tuple[int, int], cutlass: None) -> None:
    """And with more rows than one tile of block scales holds."""
    layer = with_weights(moe_config())
    copy = loaded(layer)
    for rows in (1, 128, 150):
        x, (weights, _) = random(rows, 128, seed=rows), routed(rows)
        ids = torch.tensor([chosen]).int().repeat(rows, 1)
        assert_same(copy(layer, x, weights, ids), reference(layer, x, weights, ids))


@on_cpu
def test_a_row_in_nvfp4_depends_on_no_other(cutlass: None) -> None:
    layer = with_weights(moe_config(128, 256))
    copy = loaded(layer)
    x, (weights, ids) = random(37, 256), routed(37)
    together = copy(layer, x, weights, ids)
    # The stand-in puts the rows of an expert into another order every time.
    assert torch.equal(copy(layer, x, weights, ids), together)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copy(layer, x[order], weights[order], ids[order]), together[order])
    for row in range(37):
        one = slice(row, row + 1)
        assert torch.equal(copy(layer, x[one], weights[one], ids[one]), together[one])
    # Nor on what other rows hold.
    louder = x.clone()
    louder[1::2] *= 1e9
    assert torch.equal(copy(layer, louder, weights, ids)[::2], together[::2])
    louder[1] = torch.inf
    louder[3, 7] = torch.nan
    out = copy(layer, louder, weights, ids)
    assert torch.equal(out[::2], together[::2])
    assert out[[1, 3]].isnan().all() and out[5:].isfinite().all()


@on_cpu
def test_nvfp4_rows_of_very_different_magnitude(cutlass: None) -> None:
    """Each row is quantized as well as any other."""
    layer = with_weights(moe_config(64, 256))
    x, (weights, ids) = random(12, 256), routed(12)
    factors = 2.0 ** torch.tensor([-40, -30, -20, -10, -4, 0, 1, 5, 10, 20, 30, 40.0])
    x *= factors.view(-1, 1).bfloat16()
    x[5] = 0
    x[6, 100:] = 0
    out = loaded(layer)(layer, x, weights, ids)
    assert_same(out, reference(layer, x, weights, ids))
    assert (out[5] == 0).all()
    assert (out.abs().amax(1) > 0).sum() == 11


@on_cpu
def test_nvfp4_experts_of_very_different_magnitude(cutlass: None) -> None:
    layer = with_weights(moe_config())
    layer.w13_weight.data[1] *= 2.0**20
    layer.w2_weight.data[2] *= 2.0**-30
    layer.w2_weight.data[3] = 0
    x, (weights, ids) = random(16, 128), routed(16)
    out = loaded(layer)(layer, x, weights, ids)
    assert_same(out, reference(layer, x, weights, ids))
    assert out.isfinite().all()


@pytest.mark.parametrize("block_scale", ["6", "4/6"])
def test_what_nvfp4_experts_hold(block_scale: Any, cutlass: None) -> None:
    layer = with_weights(moe_config(64, 256))
    copy = Nvfp4Experts(layer, block_scale)
    held = (*copy.w13, *copy.w2)
    places = [tensor.data_ptr() for tensor in held]
    for seed in (0, 5):  # loaded anew: into the same storage
        layer = with_weights(moe_config(64, 256), seed=seed)
        copy.load(layer)
        for weight, (codes, scales, alphas) in (
            (layer.w13_weight, copy.w13),
            (layer.w2_weight, copy.w2),
        ):
            for expert in range(EXPERTS):
                wanted = NVFP4.quantize_weight(weight[expert], EMULATION, block_scale)
                assert torch.equal(codes[expert], wanted.codes)
                assert torch.equal(alphas[expert], wanted.tensor_scale[0])
                rows, columns = wanted.block_scales.shape
                found = scales[expert].view(torch.uint8).flatten()[positions(rows, columns)]
                assert torch.equal(found, wanted.block_scales.view(torch.uint8))
        assert places == [tensor.data_ptr() for tensor in held]
    reserved = EXPERTS * (nbytes_of("nvfp4", 128, 256) + nbytes_of("nvfp4", 256, 64))
    assert copy.nbytes == sum(tensor.nbytes for tensor in held) == reserved + EXPERTS * 2 * 4


@on_cpu
def test_the_method_over_nvfp4_experts(
    stock: list[tuple[Any, ...]], cutlass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan, rows and copy together: a quantized row is what it is alone, whatever the way."""
    monkeypatch.setattr(experts, "_WARM_ROWS", (4,))
    layer = with_weights(moe_config())
    copy = loaded(layer)
    for sequences, padding in (([(0, 20, 20)], 3), ([(0, 9, 9), (60, 5, 9), (0, 9, 12)], 2)):
        method = method_of(fmt="nvfp4", shape=(len(sequences),))
        method.quantized = copy
        plan = plan_of(sequences, padding)
        x, (weights, ids) = random(plan.rows, 128), routed(plan.rows)
        x[plan.rows - padding :] = torch.nan
        ids[plan.rows - padding :] = -1
        with in_force(plan):
            out = method.apply(layer, x, weights, ids, None, None)
        precise = rows_of(plan.precise)
        assert torch.equal(out[precise], stock_result(x, weights, ids)[precise])
        for row in rows_of(plan.quantized):
            one = slice(row, row + 1)
            assert torch.equal(out[one], copy(layer, x[one], weights[one], ids[one]))
        assert (out[plan.rows - padding :] == 0).all()


# --- FP8 ---------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """vLLM's kernel object is made for real; what it is called with comes here."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(mk.FusedMoEKernel.apply)

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(signature.bind(*args, **kwargs).arguments)
        calls.append(given)
        return given["hidden_states"].clone()

    monkeypatch.setattr(mk.FusedMoEKernel, "apply", apply)
    monkeypatch.setattr(fp8_experts, "kernel_class", lambda moe: TritonExperts)
    with set_current_vllm_config(VllmConfig()):
        yield calls


def test_fp8_experts_hold_what_the_format_says(kernel_calls: list[dict[str, Any]]) -> None:
    layer = with_weights(moe_config())
    layer.w13_weight.data[2, 5] = 0
    copy = Fp8Experts(layer)
    held = (copy.w13, copy.w13_scale, copy.w2, copy.w2_scale)
    places = [tensor.data_ptr() for tensor in held]
    for seed in (0, 5):
        layer = with_weights(moe_config(), seed=seed)
        copy.load(layer)
        for weight, codes, scale in (
            (layer.w13_weight, copy.w13, copy.w13_scale),
            (layer.w2_weight, copy.w2, copy.w2_scale),
        ):
            assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
            assert (scale.dtype, scale.shape) == (torch.float32, (*weight.shape[:2], 1))
            assert codes.is_contiguous() and scale.is_contiguous()
            for expert in range(EXPERTS):
                wanted, wanted_scale = fp8.quantize(weight[expert])
                assert torch.equal(codes[expert].view(torch.uint8), wanted.view(torch.uint8))
                assert torch.equal(scale[expert], wanted_scale)
        assert places == [tensor.data_ptr() for tensor in held]
    assert copy.nbytes == EXPERTS * (nbytes_of("fp8", 128, 128) + nbytes_of("fp8", 128, 64))
    assert copy.kernel == "vLLM TritonExperts"


def test_fp8_experts_quantize_rows_by_token_and_weights_by_channel(
    kernel_calls: list[dict[str, Any]],
) -> None:
    layer = with_weights(moe_config(), swiglu_limit=7.0, swiglu_alpha=1.7, swiglu_beta=1.0)
    copy = Fp8Experts(layer)
    kernel = copy._apply.__self__
    config = kernel.fused_experts.quant_config
    assert config.quant_dtype == torch.float8_e4m3fn
    assert config.per_act_token_quant and config.per_out_ch_quant
    assert config.block_shape is None
    assert config.a1_scale is None and config.a2_scale is None  # measured, row by row
    assert config.w1_scale is copy.w13_scale and config.w2_scale is copy.w2_scale
    assert (config.gemm1_clamp_limit, config.gemm1_alpha, config.gemm1_beta) == (7.0, 1.7, 1.0)
    assert kernel.fused_experts.moe_config is layer.moe_config
    assert not kernel.is_monolithic


def test_what_fp8_experts_hand_to_the_kernel(kernel_calls: list[dict[str, Any]]) -> None:
    expert_map = torch.tensor([0, 1, -1, -1, 2, 3]).int()
    layer = with_weights(
        moe_config(),
        _expert_map=expert_map,
        activation=MoEActivation.GELU_TANH,
        global_num_experts=6,
        apply_router_weight_on_input=True,
    )
    layer.quant_method = SimpleNamespace()
    copy = Fp8Experts(layer)
    copy.load(layer)
    x, (weights, ids) = random(9, 128), routed(9)
    assert torch.equal(copy(layer, x, weights, ids), x)
    (given,) = kernel_calls
    for name, value in {
        "hidden_states": x,
        "w1": copy.w13,
        "w2": copy.w2,
        "topk_weights": weights,
        "topk_ids": ids,
        "expert_map": expert_map,
        "shared_experts": None,
        "shared_experts_input": None,
    }.items():
        assert given[name] is value, name
    assert given["activation"] == MoEActivation.GELU_TANH
    assert given["global_num_experts"] == 6
    assert given["apply_router_weight_on_input"] is True


@pytest.mark.parametrize(
    ("supported", "chosen"),
    [
        ({TritonOrCutlassExperts, TritonExperts}, TritonOrCutlassExperts),
        ({TritonExperts}, TritonExperts),
        (set(), None),
    ],
)
def test_the_kernel_of_fp8_experts(
    supported: set[type], chosen: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_config()

    def is_supported_config(
        cls: type, config: Any, weights: Any, activations: Any, layout: Any
    ) -> tuple[bool, str | None]:
        assert config is moe
        assert (weights, activations) == (kFp8StaticChannelSym, kFp8DynamicTokenSym)
        assert layout == mk.FusedMoEActivationFormat.Standard
        return cls in supported, None

    for cls in (TritonOrCutlassExperts, TritonExperts):
        monkeypatch.setattr(cls, "is_supported_config", staticmethod(is_supported_config))
    assert kernel_class(moe) is chosen


@on_cpu
def test_a_cpu_has_no_kernel_for_fp8_experts() -> None:
    assert kernel_class(moe_config()) is None


# --- which layers ------------------------------------------------------------------------------------


class OtherExperts(RoutedExperts):
    pass


def recipe_of(format: Any, **fields: Any) -> Recipe:
    return Recipe(format=format, emulate=True, **fields).resolved(frozenset(("fp8", "nvfp4")))


@pytest.fixture
def on_blackwell(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on such a GPU, with all the kernels."""
    monkeypatch.setattr(hardware, "is_gpu", lambda: True)
    monkeypatch.setattr(hardware, "has_nvfp4_experts", lambda: True)
    monkeypatch.setattr(fp8_experts, "kernel_class", lambda moe: TritonExperts)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_experts_that_are_quantized(fmt: str, on_blackwell: None) -> None:
    ledger = Ledger()
    for tensor_parallel in (1, 2):
        moe = moe_config(128, 256, moe_parallel_config=parallel(tp_size=tensor_parallel))
        layer = layer_of(moe)
        method = experts_method(layer, recipe_of(fmt), PREFIX, ledger)
        assert type(method) is PhaseExpertsMethod
        assert (method.format, method.prefix, method.ledger) == (fmt, PREFIX, ledger)
        assert not hasattr(layer, "mixquant_why_precise")
        assert not method.only_quantized
        prefill = dataclasses.replace(recipe_of(fmt), role="prefill")
        method = experts_method(layer, prefill, PREFIX, ledger)
        assert method is not None and method.only_quantized


def precise(layer: Any, recipe: Recipe) -> str:
    """Why the layer of this recipe stays precise."""
    assert experts_method(layer, recipe, PREFIX, Ledger()) is None
    return str(layer.mixquant_why_precise)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ({"moe_parallel_config": parallel(dp_size=2)}, "data parallel"),
        ({"moe_parallel_config": parallel(pcp_size=2)}, "piece of the rows"),
        ({"moe_parallel_config": parallel(sp_size=2)}, "piece of the rows"),
        ({"moe_parallel_config": parallel(use_ep=True, ep_size=2)}, "expert parallel"),
        ({"moe_parallel_config": parallel(enable_eplb=True)}, "expert parallel"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"has_bias": True}, "bias"),
        ({"kind": OtherExperts}, "OtherExperts"),
        ({"params_dtype": torch.float16}, "float16"),
    ],
)
def test_experts_that_stay_precise(
    fmt: str, layer: dict[str, Any], why: str, on_blackwell: None
) -> None:
    of_layer = {name: layer[name] for name in layer.keys() & {"kind", "params_dtype"}}
    of_config = {name: layer[name] for name in layer.keys() - of_layer.keys()}
    assert why in precise(layer_of(moe_config(**of_config), **of_layer), recipe_of(fmt))


@on_cpu
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "int8"])
def test_on_a_cpu_experts_stay_precise(fmt: str) -> None:
    assert "CPU" in precise(layer_of(moe_config()), recipe_of(fmt))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (recipe_of("int8"), "no experts in int8"),
        (recipe_of("fp8", preset="exact"), "the recipe"),
        (recipe_of({"experts": "bf16", "default": "fp8"}), "the recipe"),
        (recipe_of({"*.mlp.experts": "bf16", "default": "fp8"}), "the recipe"),
        (recipe_of({"experts": "int8", "default": "fp8"}), "no experts in int8"),
        (recipe_of("fp8", ignore=("experts",)), IGNORED),
        (recipe_of("nvfp4", ignore=("*layers.0.*",)), IGNORED),
    ],
)
def test_recipes_that_leave_experts_precise(recipe: Recipe, why: str, on_blackwell: None) -> None:
    assert precise(layer_of(moe_config()), recipe) == why


def test_a_recipe_for_experts_alone(on_blackwell: None) -> None:
    recipe = recipe_of({"experts": "nvfp4", "default": "fp8"})
    method = experts_method(layer_of(moe_config()), recipe, PREFIX, Ledger())
    assert method is not None and method.format == "nvfp4"


def test_no_fp8_kernel(on_blackwell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_experts, "kernel_class", lambda moe: None)
    assert "no FP8 experts" in precise(layer_of(moe_config()), recipe_of("fp8"))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ({"n": 96}, "96"),
        ({"k": 192}, "192"),
        ({"n": 128, "moe_parallel_config": parallel(tp_size=4)}, "32"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation"),
        ({"swiglu_limit": 7.0}, "clamped"),
        ({"apply_router_weight_on_input": True}, "weights on the input"),
    ],
)
def test_experts_that_nvfp4_cannot_hold(
    layer: dict[str, Any], why: str, on_blackwell: None
) -> None:
    names = {"swiglu_limit", "apply_router_weight_on_input"}
    of_layer = {name: layer[name] for name in layer.keys() & names}
    moe = moe_config(**{name: layer[name] for name in layer.keys() - names})
    assert why in precise(layer_of(moe, **of_layer), recipe_of("nvfp4"))
    assert experts_method(layer_of(moe, **of_layer), recipe_of("fp8"), PREFIX, Ledger())


@pytest.mark.parametrize(("operators", "native"), [(False, "nvfp4"), (True, "fp8")])
def test_nvfp4_experts_need_blackwell(
    operators: bool, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.quantization.utils import nvfp4_utils

    monkeypatch.setattr(nvfp4_utils, "cutlass_fp4_supported", lambda: operators)
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset({native}), "a GPU"))
    monkeypatch.setattr(hardware, "is_gpu", lambda: True)
    assert "Blackwell" in precise(layer_of(moe_config()), recipe_of("nvfp4"))


# --- a layer of vLLM ---------------------------------------------------------------------------------


# --- out of a prefill model ------------------------------------------------------------------------

FEATURES, WIDE = 128, 256


class Second:
    """A checkpoint with the experts of one layer, quantized as this project does."""

    def __init__(self, fmt: str, names: tuple[str, str, str], layer: Any) -> None:
        self.source, self.layers = "second", 2
        self.tensors: dict[str, Any] = {}
        for expert in range(EXPERTS):
            gate_up, down = layer.w13_weight[expert].data, layer.w2_weight[expert].data
            for name, part, whole in zip(
                names,
                (*gate_up.chunk(2), down),
                (gate_up, gate_up, down),
                strict=True,
            ):
                place = f"{PREFIX}.{expert}.{name}".replace("model.", "model.language_model.")
                if fmt == "fp8":
                    self.tensors[place] = Fp8Tensors(*fp8.quantize(part))
                else:
                    scale = nvfp4_blocks.global_scale(whole.abs().amax().float()).view(1)
                    self.tensors[place] = Nvfp4Tensors(*nvfp4_blocks.quantize(part, scale), scale)
        self.formats = dict.fromkeys(self.tensors, fmt)

    def layer(self, name: str) -> Any:
        return self.tensors[name]


NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def opens(checkpoint: Any) -> None:
        source = SecondCheckpoint(checkpoint)
        for module in (choose, experts):
            monkeypatch.setattr(module, "opened", lambda name: source)

    return opens


def of_rank(layer: Any, rank: int, ranks: int) -> Any:
    """The part of a layer's weights that one rank has."""
    n = FEATURES // ranks
    moe = moe_config(FEATURES, WIDE, moe_parallel_config=parallel(tp_size=ranks, tp_rank=rank))
    mine = layer_of(moe)
    halves = [half[:, rank * n : (rank + 1) * n] for half in layer.w13_weight.chunk(2, dim=1)]
    mine.w13_weight = nn.Parameter(torch.cat(halves, dim=1), requires_grad=False)
    down = layer.w2_weight[:, :, rank * n : (rank + 1) * n]
    mine.w2_weight = nn.Parameter(down.contiguous(), requires_grad=False)
    return mine


def taken(method: Any, layer: Any, copy: Any) -> Any:
    method._take(layer, copy)
    return copy


def method_for(layer: Any, fmt: str) -> Any:
    recipe = dataclasses.replace(recipe_of(fmt), prefill_model="second")
    method = experts_method(layer, recipe, PREFIX, Ledger())
    assert method is not None and method.format == fmt
    method.made_up = True  # these tests tell the weights apart by taking another model's
    return method


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_experts_are_the_prefill_models(
    names: Any, ranks: int, second: Any, on_blackwell: None, kernel_calls: list[dict[str, Any]]
) -> None:
    """Not the BF16 weights, quantized: those here are of another model."""
    main, other = (with_weights(moe_config(FEATURES, WIDE), seed=seed) for seed in (0, 7))
    checkpoint = Second("fp8", names, other)
    second(checkpoint)
    for rank in range(ranks):
        layer = of_rank(main, rank, ranks)
        copy = taken(method_for(layer, "fp8"), layer, Fp8Experts(layer))
        n = FEATURES // ranks
        for expert in range(EXPERTS):
            gate, up, down = list(checkpoint.tensors.values())[3 * expert : 3 * expert + 3]
            mine = slice(rank * n, (rank + 1) * n)
            wanted = torch.cat([part.dequantize()[mine] for part in (gate, up)])
            assert torch.equal(fp8.dequantize(copy.w13[expert], copy.w13_scale[expert]), wanted)
            found = fp8.dequantize(copy.w2[expert], copy.w2_scale[expert])
            assert torch.equal(found, down.dequantize()[:, mine])


def test_fp8_experts_of_a_prefill_model_where_the_middle_is_rounded_up(
    second: Any, on_blackwell: None, kernel_calls: list[dict[str, Any]]
) -> None:
    other = with_weights(moe_config(FEATURES, WIDE), seed=7)
    second(Second("fp8", NAMES[0], other))
    layer = with_weights(moe_config(192, WIDE))
    layer.moe_config.intermediate_size_per_partition_unpadded = FEATURES
    copy = taken(method_for(layer, "fp8"), layer, Fp8Experts(layer))
    rows = fp8.dequantize(copy.w13[1], copy.w13_scale[1])
    wanted = [fp8.dequantize(*fp8.quantize(half)) for half in other.w13_weight[1].data.chunk(2)]
    assert torch.equal(rows[:128], wanted[0]) and torch.equal(rows[192:320], wanted[1])
    assert (rows[128:192] == 0).all() and (rows[320:] == 0).all()
    assert (copy.w2[1][:, 128:].float() == 0).all()


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
@pytest.mark.parametrize("changed", ["nothing", "gate", "down"])
def test_a_prefill_model_of_other_experts_is_refused(
    fmt: str,
    changed: str,
    second: Any,
    on_blackwell: None,
    cutlass: None,
    kernel_calls: list[dict[str, Any]],
) -> None:
    """As after a reload of other weights: the second checkpoint is still of the old ones."""
    layer = with_weights(moe_config(FEATURES, WIDE))
    second(Second(fmt, NAMES[0], layer))
    copy = Fp8Experts(layer) if fmt == "fp8" else Nvfp4Experts(layer)
    method = method_for(layer, fmt)
    method.made_up = False
    if changed == "gate":
        layer.w13_weight.data[-1, :FEATURES] = random(FEATURES, WIDE, seed=5)
    elif changed == "down":
        layer.w2_weight.data[0] = random(WIDE, FEATURES, seed=5)
    if changed == "nothing":
        taken(method, layer, copy)
    else:
        with pytest.raises(CheckpointError, match="differs from the loaded weight"):
            taken(method, layer, copy)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nvfp4_experts_are_the_prefill_models(
    ranks: int, second: Any, on_blackwell: None, cutlass: None
) -> None:
    main, other = (with_weights(moe_config(FEATURES, WIDE), seed=seed) for seed in (0, 7))
    checkpoint = Second("nvfp4", NAMES[0], other)
    second(checkpoint)
    for rank in range(ranks):
        layer, n = of_rank(main, rank, ranks), FEATURES // ranks
        copy = taken(method_for(layer, "nvfp4"), layer, Nvfp4Experts(layer))
        mine = slice(rank * n, (rank + 1) * n)
        for expert in range(EXPERTS):
            gate, up, down = list(checkpoint.tensors.values())[3 * expert : 3 * expert + 3]
            for (codes, scales, alphas), parts in (
                (copy.w13, [part.rows(mine.start, mine.stop) for part in (gate, up)]),
                (copy.w2, [down.columns(mine.start, mine.stop)]),
            ):
                assert torch.equal(codes[expert], torch.cat([part.codes for part in parts]))
                blocks = torch.cat([part.block_scales.view(torch.uint8) for part in parts])
                found = scales[expert].view(torch.uint8).flatten()[positions(*blocks.shape)]
                assert torch.equal(found, blocks)
                assert torch.equal(alphas[expert], parts[0].global_scale[0].reciprocal())


def test_gate_and_up_with_scales_of_their_own_are_refused(
    second: Any, on_blackwell: None, cutlass: None
) -> None:
    layer = with_weights(moe_config(FEATURES, WIDE))
    checkpoint = Second("nvfp4", NAMES[0], layer)
    up = f"{PREFIX}.1.up_proj".replace("model.", "model.language_model.")
    checkpoint.tensors[up] = dataclasses.replace(checkpoint.tensors[up], global_scale=torch.ones(1))
    second(checkpoint)
    with pytest.raises(CheckpointError, match=r"expert 1.*'ignore'"):
        method_for(layer, "nvfp4")._take(layer, Nvfp4Experts(layer))


def test_experts_in_a_more_precise_format_are_rounded_from_the_bf16_weights(
    second: Any, on_blackwell: None, kernel_calls: list[dict[str, Any]]
) -> None:
    layer = with_weights(moe_config(FEATURES, WIDE))
    second(Second("nvfp4", NAMES[0], layer))
    recipe = dataclasses.replace(recipe_of("fp8"), prefill_model="second")
    method = experts_method(layer, recipe, PREFIX, Ledger())
    assert method is not None
    assert (method.format, method.prefill_model) == ("fp8", None)
    unquantized = dataclasses.replace(recipe, format={"default": "bf16"})
    assert precise(layer, unquantized) == THE_RECIPE
    second(Second("fp8", NAMES[0], layer))
    coarser = dataclasses.replace(recipe_of("nvfp4"), prefill_model="second")
    method = experts_method(layer, coarser, PREFIX, Ledger())
    assert method is not None
    assert (method.format, method.prefill_model) == ("fp8", "second")


def test_experts_that_the_prefill_model_does_not_quantize_stay_precise(
    second: Any, on_blackwell: None
) -> None:
    layer = with_weights(moe_config(FEATURES, WIDE))
    recipe = dataclasses.replace(recipe_of("fp8"), prefill_model="second")
    checkpoint = Second("fp8", NAMES[0], layer)
    one = checkpoint.formats.popitem()
    second(checkpoint)
    assert precise(layer, recipe) == "the prefill model has not all of them in one format"
    checkpoint.formats = dict([one])
    second(checkpoint)
    assert precise(layer, recipe) == "the prefill model has not all of them in one format"
    checkpoint.formats = {"model.layers.1.mlp.experts.0.gate_proj": "fp8"}
    second(checkpoint)
    assert precise(layer, recipe) == "not quantized in the prefill model"
    ignoring = dataclasses.replace(recipe, ignore=("experts",))
    assert precise(layer, ignoring) == IGNORED


@pytest.fixture
def world(tmp_path: Path) -> Iterator[VllmConfig]:
    with one_rank(tmp_path) as config:
        yield config


class Shared(nn.Module):
    """Shared experts, which every row goes through once, quantized or not."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return 100 * x


@on_cpu
@pytest.mark.parametrize("decodes", [1, 10])
def test_in_a_layer_of_vllm(
    decodes: int, world: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM makes the layer, routes and calls; precise rows are those of the layer without us."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    torch.cpu._init_amx()  # as vLLM's worker does
    monkeypatch.setattr(passes, "install", lambda method: None)
    monkeypatch.setattr(hardware, "is_gpu", lambda: True)
    monkeypatch.setattr(fp8_experts, "kernel_class", lambda moe: TritonExperts)
    monkeypatch.setattr(experts, "_quantized_experts", lambda layer, fmt, block_scale: Copy())
    config = PhaseQuantizationConfig()
    config.recipe = recipe_of("fp8")
    source = with_weights(moe_config())

    def layer_with(name: str, quant_config: PhaseQuantizationConfig | None) -> tuple[Any, Any]:
        runner = FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=128,
            intermediate_size=64,
            params_dtype=torch.bfloat16,
            quant_config=quant_config,
            prefix=name,
            shared_experts=Shared(),
        )
        layer = runner.routed_experts
        layer.w13_weight.data.copy_(source.w13_weight)
        layer.w2_weight.data.copy_(source.w2_weight)
        layer.quant_method.process_weights_after_loading(layer)
        return runner, layer.quant_method

    plain, _ = layer_with("model.layers.1.mlp.experts", None)
    ours, method = layer_with(PREFIX, config)
    assert type(method) is PhaseExpertsMethod
    copy = method.quantized
    assert torch.equal(copy.loaded[0], source.w13_weight)
    assert [line.shape for line in method.described("a")] == [(EXPERTS, 128, 128)]
    # Nothing that a checkpoint would have to fill.
    assert [n.rpartition(".")[2] for n, _ in ours.named_parameters()] == [
        n.rpartition(".")[2] for n, _ in plain.named_parameters()
    ]

    plan = plan_of([(0, 30, 30), (50, decodes, 9)])
    x, logits = random(plan.rows, 128), random(plan.rows, EXPERTS, seed=1)
    with set_forward_context(None, world, num_tokens=plan.rows):
        assert torch.equal(ours(x, logits), plain(x, logits))
        assert not copy.calls
        with in_force(plan):
            out = ours(x, logits)
        precise = rows_of(plan.precise)
        alone = plain(x[precise], logits[precise])
    assert torch.equal(out[precise], alone)
    ((layer, seen, weights, ids),) = copy.calls
    assert layer is ours.routed_experts
    assert len(seen) == (plan.rows if decodes == 1 else 29)
    assert ids.shape == weights.shape == (len(seen), TOP_K)
    torch.testing.assert_close(
        out[:29], 100 * x[:29] - stock_result(seen, weights, ids)[:29], rtol=2**-6, atol=0.1
    )
    (shared,) = (module for module in ours.modules() if isinstance(module, Shared))
    assert shared.rows == [plan.rows, plan.rows]
