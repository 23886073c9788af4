"""A linear layer in vLLM: its layout, and its operator against the rule, row by row."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("vllm")

from example_counts import up_to
from hypothesis import event, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from one_rank import one_rank
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)
from vllm.platforms import current_platform

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.core.recipe import Recipe
from mixquant.core.summary import Summary
from mixquant.engines.vllm.config import PhaseQuantizationConfig
from mixquant.engines.vllm.linear import operator
from mixquant.engines.vllm.linear.layout import lay_out
from mixquant.engines.vllm.linear.method import PhaseLinearMethod
from mixquant.engines.vllm.loading import online as loading
from mixquant.engines.vllm.loading.online import CannotReload
from mixquant.engines.vllm.patches import runners as passes
from mixquant.engines.vllm.patches.loading import patch_load_weights, refuse_kernel_format

K = 64
ATTENTION = "model.layers.0.self_attn"
FORMATS = ("int8", "fp8", "nvfp4")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def recipe_of(format: Any, native: tuple[str, ...] = ("int8",), **fields: Any) -> Recipe:
    return Recipe(format=format, emulate=True, **fields).resolved(frozenset(native))


# --- the layout --------------------------------------------------------------------------------------


def layout_of(
    recipe: Recipe,
    prefix: str,
    sizes: list[int],
    packed: dict[str, list[str]] | None = None,
    in_features: int = K,
) -> tuple[list[tuple[int, int, str]], str | None]:
    """The parts ``(start, stop, format)``, and why those in BF16 are."""
    members = (packed or {}).get(prefix.rpartition(".")[2])
    parts = lay_out(recipe, prefix, sizes, in_features, members)
    assert [parts[0].features[0], parts[-1].features[1]] == [0, sum(sizes)]
    reasons = [part.why_precise for part in parts if part.format == "bf16"]
    return [(*part.features, part.format) for part in parts], reasons[0] if reasons else None


BALANCED = recipe_of("nvfp4", ("fp8", "nvfp4"))


@pytest.mark.parametrize("name", ["query_key_value", "Wqkv", "wqkv", "c_attn"])
def test_what_writes_the_cache_is_spared_whatever_it_is_called(name: str) -> None:
    layer = f"transformer.h.0.attn.{name}"
    parts = [(0, 64, "nvfp4"), (64, 128, "fp8")]
    assert layout_of(BALANCED, layer, [64, 32, 32]) == (parts, None)
    assert layout_of(BALANCED, layer, [128]) == ([(0, 128, "fp8")], None)
    # vLLM's loaders bring BLOOM's and InternLM2's into the order of its own layers.
    second = dataclasses.replace(BALANCED, prefill_model="nowhere")
    found, why = layout_of(second, layer, [64, 32, 32])
    assert found == [(0, 128, "bf16")] and why is not None and "another order" in why


def test_balanced_sets_keys_and_values_apart() -> None:
    assert layout_of(BALANCED, f"{ATTENTION}.qkv_proj", [64, 32, 32]) == (
        [(0, 64, "nvfp4"), (64, 128, "fp8")],
        None,
    )
    without_fp8 = recipe_of("nvfp4", ("nvfp4",))
    assert layout_of(without_fp8, f"{ATTENTION}.qkv_proj", [64, 32, 32]) == (
        [(0, 64, "nvfp4"), (64, 128, "bf16")],
        "the recipe",
    )
    fast = recipe_of("nvfp4", preset="fast")
    assert layout_of(fast, f"{ATTENTION}.qkv_proj", [64, 32, 32])[0] == [(0, 128, "nvfp4")]


def test_projections_of_one_format_are_one_part() -> None:
    assert layout_of(BALANCED, "model.layers.0.mlp.gate_up_proj", [96, 96])[0] == [
        (0, 192, "nvfp4")
    ]
    apart = recipe_of({"up_proj": "fp8", "default": "int8"})
    assert layout_of(apart, "model.layers.0.mlp.gate_up_proj", [96, 96])[0] == [
        (0, 96, "int8"),
        (96, 192, "fp8"),
    ]


@pytest.mark.parametrize("sizes", [[64, 32, 32], [32, 16, 16], [16, 16, 16], [48, 16, 16]])
def test_sizes_are_those_of_this_rank(sizes: list[int]) -> None:
    """Under tensor parallelism, with keys and values replicated or not."""
    q = sizes[0]
    parts, _ = layout_of(BALANCED, f"{ATTENTION}.qkv_proj", sizes)
    assert parts == [(0, q, "nvfp4"), (q, sum(sizes), "fp8")]


def test_members_are_those_that_the_model_names() -> None:
    packed = {"qkv": ["wq", "wk", "wv"], "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
    recipe = recipe_of({"wk": "bf16", "in_proj_z": "nvfp4", "default": "int8"})
    assert layout_of(recipe, "model.layers.0.attn.qkv", [64, 32, 32], packed) == (
        [(0, 64, "int8"), (64, 96, "bf16"), (96, 128, "int8")],
        "the recipe",
    )
    # Where two names stand for four parts nobody knows which rows are whose.
    prefix = "model.layers.0.linear_attn.in_proj_qkvz"
    assert layout_of(recipe, prefix, [32, 32, 64, 64], packed)[0] == [(0, 192, "int8")]
    for milder in ("fp8", "bf16"):
        recipe = recipe_of({"in_proj_qkv": milder, "default": "nvfp4"})
        assert layout_of(recipe, prefix, [32, 32, 64, 64], packed)[0] == [(0, 192, milder)]
    # A recipe that speaks of the fused layer itself is obeyed.
    assert layout_of(BALANCED, prefix, [32, 32, 64, 64], packed)[0] == [(0, 192, "fp8")]


@pytest.mark.parametrize(
    ("prefix", "fields", "why"),
    [
        (f"{ATTENTION}.qkv_proj", {"ignore": ("qkv_proj",)}, "ignore"),
        (f"{ATTENTION}.qkv_proj", {"ignore": ("*layers.0.*",)}, "ignore"),
        ("model.layers.0.mlp.down_proj", {"ignore": ("down_proj",)}, "ignore"),
        ("model.layers.0.mlp.down_proj", {"preset": "exact"}, "recipe"),
        (f"{ATTENTION}.kv_b_proj", {}, "rows"),
        ("model.layers.0.linear_attn.conv1d", {}, "convolution"),
    ],
)
def test_layers_that_stay_precise(prefix: str, fields: dict[str, Any], why: str) -> None:
    parts, said = layout_of(recipe_of("int8", **fields), prefix, [64, 32, 32])
    assert parts == [(0, 128, "bf16")]
    assert said is not None and why in said


def test_a_member_that_is_ignored_is_a_part_of_its_own() -> None:
    recipe = recipe_of("int8", ignore=("q_proj",))
    parts, _ = layout_of(recipe, f"{ATTENTION}.qkv_proj", [64, 32, 32])
    assert parts == [(0, 64, "bf16"), (64, 128, "int8")]


def test_shapes_that_the_format_cannot_hold() -> None:
    parts, why = layout_of(recipe_of("nvfp4"), "model.fc", [32], in_features=24)
    assert parts == [(0, 32, "bf16")]
    assert why is not None and "nvfp4" in why and "24" in why


# --- layers of vLLM ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers want to know which rank they are of."""
    with one_rank(tmp_path_factory.mktemp("world")):
        yield
    built.cache_clear()


@dataclass(frozen=True)
class Built:
    layer: Any
    method: PhaseLinearMethod
    weight: Tensor  # as it was loaded
    bias: Tensor | None

    def __call__(self, x: Tensor, plan: PhasePlan | None = None) -> Tensor:
        with in_force(plan):
            return self.layer(x)[0]

    def precise(self, x: Tensor) -> Tensor:
        """vLLM's own product, as it would be without us."""
        return self.layer.cpu_linear(x, self.layer.weight, self.layer.bias)


RECIPES = {
    "int8": recipe_of("int8"),
    "fp8": recipe_of("fp8"),
    "nvfp4": recipe_of("nvfp4", preset="fast"),
    "two formats": recipe_of({"k_proj": "fp8", "default": "int8"}),
    "bf16 between": recipe_of({"k_proj": "bf16", "default": "int8"}),
}


def keep_weights(patch: pytest.MonkeyPatch) -> None:
    """Has the CPU backend leave weights as they are, as on a GPU."""
    patch.setattr(
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear),
    )


@functools.cache
def built(kind: str, biased: bool = False, pack: bool = True, seed: int = 0) -> Built:
    """A layer of 128 features. ``pack``: the CPU backend may pack its weight and throw it away."""
    config = PhaseQuantizationConfig()
    config.recipe = RECIPES[kind]
    default = torch.get_default_dtype()
    patch = pytest.MonkeyPatch()
    try:
        torch.set_default_dtype(torch.bfloat16)
        patch.setattr(passes, "install", lambda method: None)
        layer = QKVParallelLinear(
            K, 16, 4, 2, bias=biased, quant_config=config, prefix=f"{ATTENTION}.qkv_proj"
        )
        weight = random(128, K, seed=seed)
        layer.weight.data.copy_(weight)
        bias = random(128, seed=seed + 1) if biased else None
        if bias is not None:
            layer.bias.data.copy_(bias)
        if not pack:
            keep_weights(patch)
        layer.quant_method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(default)
        patch.undo()
    return Built(layer, layer.quant_method, weight, bias)


on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build")
KINDS = ("int8", "fp8", "nvfp4", "two formats", "bf16 between")


def rows_of(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


def check(it: Built, x: Tensor, plan: PhasePlan) -> None:
    """Every row of the layer's output is what the plan says of it."""
    out = it(x, plan)
    assert (out.dtype, out.shape) == (x.dtype, (len(x), 128))
    if not plan.quantized:
        assert torch.equal(out, it.precise(x))
        return
    precise, quantized = rows_of(plan.precise), rows_of(plan.quantized)
    if precise:
        assert torch.equal(out[precise], it.precise(x[precise]))
        torch.testing.assert_close(
            out[precise], F.linear(x[precise], it.weight, it.bias), rtol=2**-7, atol=2**-6
        )
    padding = sorted(set(range(len(x))) - {*precise, *quantized})
    assert (out[padding] == 0).all()
    for (start, stop), product in it.method.products:
        bias = None if it.bias is None else it.bias[start:stop]
        for row in quantized:
            alone = x.new_empty(1, stop - start)
            if product is None:
                alone = F.linear(x[row : row + 1], it.weight[start:stop], bias)
            else:
                product(x[row : row + 1], bias, alone)
            if product is not None and product.format == "int8":
                assert torch.equal(out[row, start:stop], alone[0])
            else:  # one rounding, of a sum in another order
                torch.testing.assert_close(out[row, start:stop], alone[0], rtol=2**-7, atol=2**-6)


def plan_of(
    sequences: list[tuple[int, int, int]], padding: int, thresholds: Thresholds
) -> PhasePlan:
    """As the runners' follower makes it: padding comes after the last sequence."""
    table = np.array([*sequences, (-padding, padding, 0)])
    return plan_pass(thresholds, table[:, 0], table[:, 1], table[:, 2])


# First position, rows, length of the prompt.
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 25), st.integers(1, 45)), min_size=1, max_size=5
)


@on_cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
@given(
    sequences=SEQUENCES,
    padding=st.integers(0, 8),
    head=st.integers(0, 4),
    tail=st.integers(0, 3),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(sequences=[(0, 40, 41)], padding=0, head=0, tail=1, biased=False, seed=1)
@example(sequences=[(0, 20, 20), (0, 20, 20)], padding=3, head=0, tail=1, biased=False, seed=1)
@example(
    sequences=[(0, 9, 9), (5, 1, 3), (0, 9, 20)], padding=0, head=4, tail=1, biased=False, seed=1
)
@hypothesis_settings(deadline=None, max_examples=up_to(15))
def test_each_row_is_multiplied_as_its_plan_says(
    kind: str,
    pack: bool,
    sequences: list[tuple[int, int, int]],
    padding: int,
    head: int,
    tail: int,
    biased: bool,
    seed: int,
) -> None:
    plan = plan_of(sequences, padding, Thresholds(0, head, tail))
    if plan.quantized:
        span = plan.quantized[-1][1] - plan.quantized[0][0]
        event("together" if plan.quantized_rows >= 0.9 * span else "gathered")
    check(built(kind, biased, pack), random(plan.rows, K, seed=seed), plan)


@on_cpu
def test_a_bf16_part_of_a_packed_weight_with_bias() -> None:
    """vLLM's AMX kernels make the layer's bias FP32, and take no other."""
    plan = plan_of([(0, 20, 20)], 0, Thresholds())
    check(built("bf16 between", biased=True), random(20, K, seed=1), plan)


@on_cpu
@pytest.mark.parametrize(
    ("sequences", "seen"),
    [
        ([(0, 30, 40)], 30),  # one range
        ([(0, 20, 20), (0, 20, 20)], 39),  # the precise row in between is computed twice
        ([(0, 10, 10), (50, 8, 9), (0, 10, 10)], 18),  # too many: the others are gathered
    ],
)
def test_few_precise_rows_are_not_worth_gathering_the_others(
    sequences: list[tuple[int, int, int]], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = built("int8", pack=False)
    counts: list[int] = []
    ((features, product),) = it.method.products

    class Recorded:
        format = product.format

        def encode(self, rows: Tensor) -> Any:
            counts.append(len(rows))
            return product.encode(rows)

        def multiply(self, encoded: Any, bias: Any, out: Tensor) -> None:
            product.multiply(encoded, bias, out)

    monkeypatch.setattr(it.method, "products", ((features, Recorded()),))
    plan = plan_of(sequences, 2, Thresholds())
    it(random(plan.rows, K), plan)
    assert counts == [seen]
    monkeypatch.undo()
    check(it, random(plan.rows, K), plan)


@on_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_rows_differ_from_precise_ones(kind: str) -> None:
    """Or rows taken for one another would pass."""
    it = built(kind)
    x = random(30, K, seed=3)
    out, precise = it(x, everything_quantized(30)), it.precise(x)
    for (start, stop), product in it.method.products:
        differ = ((out - precise)[:, start:stop].abs() > 2**-5).any(dim=1)
        assert differ.all() if product is not None else not differ.any()


@on_cpu
@pytest.mark.parametrize("kind", ["int8", "bf16 between"])
@pytest.mark.parametrize("pack", [True, False])
def test_without_a_plan_that_fits_the_layer_is_vllms_own(kind: str, pack: bool) -> None:
    it = built(kind, True, pack)
    x = random(20, K, seed=1)
    wanted = it.precise(x)
    for plan in (
        None,
        everything_quantized(19),
        everything_quantized(21),
        PhasePlan(20, (), ((0, 20),)),
    ):
        assert torch.equal(it(x, plan), wanted)


@on_cpu
def test_leading_dimensions_are_flattened_and_kept() -> None:
    it = built("int8", True)
    x = random(2, 5, K)
    plan = plan_of([(0, 9, 9)], 1, Thresholds())
    assert torch.equal(it(x, plan), it(x.view(10, K), plan).view(2, 5, 128))
    wide = random(10, 2 * K)[:, :K]
    assert torch.equal(it(wide, plan), it(wide.contiguous(), plan))


@on_cpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_the_operator_is_one_that_torch_can_trace(biased: bool, planned: bool) -> None:
    it = built("two formats", biased)
    x = random(20, K)
    plan = plan_of([(0, 10, 10), (0, 9, 9)], 1, Thresholds()) if planned else None
    arguments = (x, it.layer.bias, it.layer.mixquant_number, 128)
    with in_force(plan):
        torch.library.opcheck(torch.ops.mixquant.phase_linear.default, arguments)


@on_cpu
def test_one_compiled_graph_serves_every_layer_and_plan() -> None:
    layers = [built("int8", seed=0), built("two formats", seed=7)]
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=True)
    def product(x: Tensor, number: Tensor) -> Tensor:
        return torch.ops.mixquant.phase_linear(x, None, number, 128)

    for rows in (20, 33):
        x = random(rows, K)
        for plan in (None, everything_quantized(rows), plan_of([(0, rows, rows)], 0, Thresholds())):
            for it in layers:
                with in_force(plan):
                    compiled = product(x, it.layer.mixquant_number)
                assert torch.equal(compiled, it(x, plan))
    assert len(graphs) == 1


@on_cpu
def test_a_layer_that_is_loaded_anew_has_a_new_copy_under_its_old_number() -> None:
    it = built("int8", seed=21)
    number, x = int(it.layer.mixquant_number), random(20, K)
    before = it(x, everything_quantized(20))
    it.layer.weight = torch.nn.Parameter(random(128, K, seed=99), requires_grad=False)
    it.method.process_weights_after_loading(it.layer)
    assert int(it.layer.mixquant_number) == number
    after = it(x, everything_quantized(20))
    assert torch.equal(after, built("int8", seed=99)(x, everything_quantized(20)))
    assert not torch.equal(after, before)
    built.cache_clear()


@on_cpu
def test_a_layer_is_found_by_its_number_wherever_that_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = built("int8", seed=1).layer, built("int8", seed=2).layer
    assert one.mixquant_number.device == one.weight.device
    monkeypatch.setattr(operator, "_at", dict(operator._at))
    assert operator._layer_of(one.mixquant_number) is one
    copy = other.mixquant_number.clone()
    assert operator._layer_of(copy) is other
    operator._at[copy.data_ptr()] = 10**9  # that of a layer that is gone
    assert operator._layer_of(copy) is other


@on_cpu
def test_layers_have_numbers_of_their_own_and_go_away() -> None:
    built.cache_clear()
    operator._layers.clear()
    layers = [built("int8", seed=seed) for seed in range(3)]
    assert len({int(it.layer.mixquant_number) for it in layers}) == len(operator._layers) == 3
    x = random(20, K)
    assert not torch.equal(layers[0](x), layers[1](x))
    del layers
    built.cache_clear()
    gc.collect()  # a weight that the backend has not packed knows its layer, by vLLM's loader
    assert not operator._layers


@on_cpu
def test_other_layers_of_vllm() -> None:
    """Without a copy a layer is untouched; fused ones of the MLP and unfused ones are taken, too."""
    config = PhaseQuantizationConfig()
    config.recipe = recipe_of({"gate_up_proj": "int8", "o_proj": "int8", "default": "bf16"})
    x = random(20, K)
    patch = pytest.MonkeyPatch()
    patch.setattr(passes, "install", lambda method: None)
    for layer, taken in (
        (
            ReplicatedLinear(
                K,
                32,
                False,
                params_dtype=torch.bfloat16,
                quant_config=config,
                prefix="model.layers.0.self_attn.o_proj",
            ),
            True,
        ),
        (
            MergedColumnParallelLinear(
                K,
                [48, 48],
                False,
                params_dtype=torch.bfloat16,
                quant_config=config,
                prefix="model.layers.0.mlp.gate_up_proj",
            ),
            True,
        ),
        (
            ReplicatedLinear(
                K,
                32,
                False,
                params_dtype=torch.bfloat16,
                quant_config=config,
                prefix="model.layers.0.mlp.down_proj",
            ),
            False,
        ),
    ):
        features = layer.weight.shape[0]
        layer.weight.data.copy_(random(features, K))
        layer.quant_method.process_weights_after_loading(layer)
        assert hasattr(layer, "mixquant_number") == taken
        with in_force(everything_quantized(20)):
            out = layer(x)[0]
        assert out.shape == (20, features)
        assert torch.equal(out, layer.cpu_linear(x, layer.weight, None)) != taken
        lines = layer.quant_method.described("name")
        assert [(line.name, line.shape, line.format) for line in lines] == [
            ("name", (features, K), "int8" if taken else "bf16")
        ]
        assert (lines[0].nbytes > 0, lines[0].why_precise) == (
            taken,
            None if taken else "the recipe",
        )
    patch.undo()


@on_cpu
def test_parts_are_described_one_by_one() -> None:
    it = built("bf16 between")
    lines = it.method.described("a.qkv_proj")
    assert [(line.name, line.shape[0], line.format) for line in lines] == [
        ("a.qkv_proj.q_proj", 64, "int8"),
        ("a.qkv_proj.k_proj", 32, "bf16"),
        ("a.qkv_proj.v_proj", 32, "int8"),
    ]
    assert [line.why_precise for line in lines] == [None, "the recipe", None]


@on_cpu
def test_the_ledger_hears_of_every_layer() -> None:
    it = built("bf16 between", seed=5)
    assert it.method.ledger._weights == {f"{ATTENTION}.qkv_proj": 128 * K * 2}
    assert it.method.ledger._copies == {f"{ATTENTION}.qkv_proj": 96 * K + 4 * 96}


# --- prefill engines ---------------------------------------------------------------------------------


class Loaded:
    """A layer of a prefill engine, loaded as vLLM loads one: a projection at a time, in any order."""

    def __init__(self, kind: str, biased: bool = False, order: str = "vkq") -> None:
        config = PhaseQuantizationConfig()
        config.recipe = dataclasses.replace(RECIPES[kind], role="prefill").resolved(frozenset())
        default = torch.get_default_dtype()
        patch = pytest.MonkeyPatch()
        try:
            torch.set_default_dtype(torch.bfloat16)
            patch.setattr(passes, "install", lambda method: None)
            self.layer = QKVParallelLinear(
                K, 16, 4, 2, bias=biased, quant_config=config, prefix=f"{ATTENTION}.qkv_proj"
            )
        finally:
            torch.set_default_dtype(default)
            patch.undo()
        self.method = self.layer.quant_method
        self.began_without_memory = self.layer.weight.is_meta
        weight, bias = random(128, K), random(128, seed=1)
        places = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}
        self.done = []  # after each projection, whether the copy was there
        for name in order:
            self.layer.weight.weight_loader(self.layer.weight, weight[places[name]], name)
            if biased:
                self.layer.bias.weight_loader(self.layer.bias, bias[places[name]], name)
            self.done.append(bool(self.method.products))


@on_cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_prefill_engine_gives_the_weight_back_when_the_last_of_it_was_read(
    kind: str, biased: bool
) -> None:
    """And multiplies every row with the copy, whatever the plan."""
    it, both = Loaded(kind, biased), built(kind, biased)
    assert it.began_without_memory
    assert it.done == [False, False, True]
    assert it.layer.weight.numel() == 0
    assert it.method.uses_meta_device  # what vLLM's loaders go by
    x = random(20, K, seed=3)
    wanted = both(x, everything_quantized(20))
    for plan in (None, everything_quantized(19), plan_of([(0, 20, 20)], 0, Thresholds())):
        with in_force(plan):
            assert torch.equal(it.layer(x)[0], wanted)
    one = x[:1]
    assert torch.equal(it.layer(one)[0], both(one, everything_quantized(1)))
    # vLLM comes by once more when the whole model is loaded.
    products = it.method.products
    it.method.process_weights_after_loading(it.layer)
    assert it.method.products is products


@on_cpu
def test_what_a_prefill_engine_holds_and_what_it_gave_back() -> None:
    it = Loaded("bf16 between")
    lines = it.method.described("a.qkv_proj")
    assert [(line.format, line.freed) for line in lines] == [
        ("int8", 64 * K * 2),
        ("bf16", 32 * K * 2),
        ("int8", 32 * K * 2),
    ]
    assert lines[1].nbytes == 32 * K * 2  # the part that stays, in a tensor of its own
    summary = Summary(it.method.recipe, tuple(lines))
    assert summary.extra_bytes == 96 * K + 4 * 96 - 96 * K * 2
    text = str(summary)
    assert "freed MiB" in text and "prefill engine" in text
    # Nothing of the weight is counted as staying.
    assert it.method.ledger._weights == {f"{ATTENTION}.qkv_proj": 0}
    assert it.method.ledger._copies == {f"{ATTENTION}.qkv_proj": 96 * K + 4 * 96 + 32 * K * 2}


@on_cpu
def test_a_layer_that_stays_bf16_is_loaded_as_ever_in_a_prefill_engine() -> None:
    config = PhaseQuantizationConfig()
    config.recipe = Recipe(preset="exact", role="prefill").resolved(frozenset({"int8"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "install", lambda method: None)
        layer = ReplicatedLinear(K, 32, False, quant_config=config, prefix="model.layers.0.o_proj")
    assert not layer.weight.is_meta
    assert not layer.quant_method.uses_meta_device


@on_cpu
def test_a_prefill_engine_loads_once_and_says_so() -> None:
    """Captured graphs read the copy; a second one would be somewhere else."""
    it = Loaded("int8")
    del it.layer._already_called_process_weights_after_loading  # as vLLM's reload does
    with pytest.raises(CannotReload, match="restart"):
        it.method.process_weights_after_loading(it.layer)


@on_cpu
def test_a_loader_that_leaves_weights_where_they_were_is_named() -> None:
    it = Loaded("int8", order="vk")
    with pytest.raises(RuntimeError, match="--load-format"):
        it.method.process_weights_after_loading(it.layer)


@on_cpu
def test_a_kernel_that_reads_the_weight_itself_is_switched_off() -> None:
    """DeepSeek's for a few rows; here under the name that it has there."""
    it = Loaded("int8", order="vk")
    it.layer._use_min_latency_gemm = True
    it.layer.weight.weight_loader(it.layer.weight, random(64, K), "q")
    assert it.layer._use_min_latency_gemm is False


# --- no rows, and weights that are loaded anew ----------------------------------------------------


@on_cpu
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_an_empty_pass(shape: tuple[int, ...]) -> None:
    prefill = Loaded("int8").layer
    for layer, plan in (
        (prefill, None),
        (prefill, everything_quantized(0)),
        (built("int8").layer, everything_quantized(0)),
    ):
        with in_force(plan):
            out = layer(random(*shape))[0]
        assert out.shape == (*shape[:-1], 128)
        assert out.dtype == torch.bfloat16
    built.cache_clear()


@on_cpu
def test_a_weight_that_was_written_to_where_it_is_has_a_new_copy() -> None:
    """As a worker extension does that calls the model's load_weights: vLLM processes nothing then."""
    it = built("int8", pack=False, seed=31)
    model = torch.nn.ModuleDict({"layer": it.layer})
    after = random(128, K, seed=99)

    def load_weights(weights: Any) -> set[str]:
        it.layer.weight.data.copy_(weights)
        return {"layer.weight"}

    model.load_weights = load_weights  # type: ignore[assignment]
    patch_load_weights(model)
    x = random(20, K)
    products = it.method.products
    assert model.load_weights(it.weight) == {"layer.weight"}
    assert it.method.products is products  # the same numbers
    model.load_weights(after)
    wanted = built("int8", pack=False, seed=99)
    assert torch.equal(it(x, everything_quantized(20)), wanted(x, everything_quantized(20)))
    assert torch.equal(it(x), wanted(x))
    built.cache_clear()


def test_a_refusal_does_not_leave_other_copies_old() -> None:
    renewed: list[str] = []

    class Method:
        def __init__(self, name: str) -> None:
            self.name = name

        def renew(self, layer: Any) -> None:
            if self.name == "experts":
                raise CannotReload("the experts were not processed")
            renewed.append(self.name)

    model: Any = torch.nn.ModuleDict()
    for name in ("first", "experts", "last"):
        model[name] = torch.nn.Module()
        model[name].quant_method = Method(name)
    model.load_weights = lambda weights: None
    patch_load_weights(model)
    with pytest.raises(CannotReload, match="experts"):
        model.load_weights([])
    assert renewed == ["first", "last"]


@on_cpu
def test_graphs_that_read_the_copy_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    it = built("int8", pack=False, seed=41)
    keep_weights(monkeypatch)
    it.method.captured = True
    it.method.process_weights_after_loading(it.layer)  # graphs are precise
    monkeypatch.setattr(it.method, "recipe", dataclasses.replace(it.method.recipe, everywhere=True))
    with pytest.raises(CannotReload, match="everywhere") as caught:
        it.method.process_weights_after_loading(it.layer)
    assert "\n" not in str(caught.value)
    it.method.captured = False
    it.method.process_weights_after_loading(it.layer)
    built.cache_clear()


@on_cpu
def test_a_reloaded_weight_is_read_where_vllm_keeps_it() -> None:
    """vLLM processes a layer with new tensors, and then copies them into the old ones."""
    from vllm.model_executor.model_loader.reload import layerwise

    it = built("int8", pack=False, seed=51)
    kept = it.layer.weight
    assert loading.kept_weight(it.layer) is kept
    layerwise.record_metadata_for_reloading(it.layer)
    layerwise.initialize_layerwise_reload(it.layer)
    assert it.layer.weight is not kept
    assert loading.is_loading(it.layer)
    # Whatever is in it meanwhile, vLLM processes it when it has all of it.
    renewed: list[Any] = []
    it.method.renew = renewed.append  # type: ignore[method-assign]
    model = torch.nn.ModuleDict({"layer": it.layer})
    model.load_weights = lambda weights: None  # type: ignore[assignment]
    patch_load_weights(model)
    model.load_weights([])
    assert renewed == []
    assert loading.kept_weight(it.layer) is kept
    built.cache_clear()


def test_weights_in_a_kernels_format_are_refused() -> None:
    refuse_kernel_format(True)
    with pytest.raises(CannotReload, match="is_checkpoint_format=True"):
        refuse_kernel_format(False)
