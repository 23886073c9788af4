"""What the log says at start: of settings that no layer of the loaded model follows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.distributed
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import PPMissingLayer

from mixquant.core.recipe import Recipe
from mixquant.core.summary import Layer
from mixquant.engines.vllm import table, versions


def bare(kind: Any, **attributes: Any) -> Any:
    """A layer of vLLM's as far as its class goes."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def model(missing: bool = False) -> nn.Module:
    """Two layers of the decoder, a tower's, a router and the head, none of them quantized."""
    whole, decoder, layer = nn.Module(), nn.Module(), nn.Module()
    layer.qkv_proj = bare(QKVParallelLinear, mixquant_why_precise="the recipe")
    layer.down_proj = PPMissingLayer() if missing else bare(ReplicatedLinear)
    layer.gate = bare(ReplicatedLinear, mixquant_why_precise="an expert router")
    decoder.layers = nn.ModuleList([layer])
    whole.model = decoder
    whole.visual = bare(ReplicatedLinear, mixquant_why_precise="its rows are not tokens")
    whole.lm_head = bare(ParallelLMHead)
    return whole


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    logger = SimpleNamespace(
        info=lambda *args: None, warning=lambda text, *args: lines.append(text % args)
    )
    monkeypatch.setattr(table, "logger", logger)
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 0)
    return lines


def resolved(**fields: Any) -> Recipe:
    return Recipe.from_dict(fields).resolved(frozenset({"int8", "fp8"}))


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, []),
        ({"ignore": ["k_proj", "qkv_proj", "lm_head", "visual", "gate"]}, []),
        ({"ignore": ["*.layers.0.*"]}, []),
        ({"ignore": ["kproj", "lm_haed"]}, ["'kproj' matches no", "'lm_haed' matches no"]),
        ({"format": {"default": "fp8", "v_proj": "int8"}}, []),
        ({"format": {"default": "fp8", "vproj": "int8"}}, ["'vproj' matches no"]),
        ({"format": {"default": "fp8", "visual": "int8"}}, ["'visual' changes nothing"]),
    ],
)
def test_patterns_without_effect_are_in_the_log(
    recipe: dict[str, Any], named: list[str], said: list[str]
) -> None:
    table.log_table(model(), resolved(**recipe), ())
    assert said.pop().startswith(
        "no layer of this model is quantized: the recipe; an expert router"
    )
    assert len(said) == len(named)
    assert all(part in line for part, line in zip(named, said, strict=True))


def test_experts_are_known_by_the_name_that_recipes_have_for_them(said: list[str]) -> None:
    """vLLM's layer lies one deeper than the name that it gave the quantization method."""
    whole, (kind,) = model(), versions.moe_layer_classes()
    ignored = {"ignore": ["experts"]}
    layer = nn.Module()
    whole.model.layers.append(layer)  # type: ignore[operator, union-attr]
    layer.experts = nn.Module()
    layer.experts.routed_experts = bare(
        kind,
        mixquant_name="model.layers.1.experts",
        mixquant_why_precise="named by the recipe's ignore",
    )
    table.log_table(whole, resolved(**ignored), ())
    assert not [line for line in said if "'experts'" in line]
    names = [one.name for one in table.summary(whole, resolved(**ignored)).layers]
    assert "model.layers.1.experts" in names


def test_a_stage_of_a_pipeline_speaks_of_its_own_layers(said: list[str]) -> None:
    table.log_table(model(missing=True), resolved(ignore=["down_proj"]), ())
    assert "'down_proj' matches no linear layer" in said[0]
    assert said[0].endswith("(of the layers of this pipeline stage)")


@pytest.mark.parametrize("recipe", [{"preset": "exact"}, {"role": "decode", "ignore": ["kproj"]}])
def test_where_nothing_is_asked_for_nothing_is_said(
    recipe: dict[str, Any], said: list[str]
) -> None:
    table.log_table(model(), resolved(**recipe), ())
    assert said == []


def test_other_ranks_say_nothing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 1)
    table.log_table(model(), resolved(ignore=["kproj"]), ())
    assert said == []


def test_a_quantized_layer_is_enough(said: list[str]) -> None:
    whole = model()
    copy = SimpleNamespace(
        described=lambda name: [
            Layer(name, (4, 4), "int8", "a kernel", True, 16, None),
        ]
    )
    (kind,) = versions.moe_layer_classes()
    whole.experts = bare(kind, quant_method=copy)
    table.log_table(whole, resolved(), ())
    assert said == []


@pytest.mark.parametrize(("emulate", "native", "warned"), [(0, 0, 1), (1, 0, 0), (0, 1, 0)])
def test_a_silent_fall_back_to_emulation_is_in_the_log(
    emulate: bool, native: bool, warned: bool, said: list[str]
) -> None:
    whole, (kind,) = model(), versions.moe_layer_classes()
    layer = Layer("experts", (4, 4), "int8", "a kernel", bool(native), 16, None)
    whole.experts = bare(kind, quant_method=SimpleNamespace(described=lambda name: [layer]))
    table.log_table(whole, resolved(emulate=bool(emulate)), ())
    assert [line.split(",")[0] for line in said] == ["1 layers are emulated"] * warned
