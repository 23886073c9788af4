"""A linear layer in vLLM under a recipe with formats and a prefill_model: whose copy it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import second_checkpoints
import tiny_models
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from one_rank import one_rank
from vllm.model_executor.layers.linear import QKVParallelLinear

from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.recipe import Recipe
from mixquant.engines.vllm.config import PhaseQuantizationConfig
from mixquant.engines.vllm.linear.layout import lay_out
from mixquant.engines.vllm.patches import runners as passes
from mixquant.engines.vllm.products.in_torch import EmulatedProduct
from mixquant.engines.vllm.settings import resolve
from mixquant.formats import BY_NAME, fp8

ATTENTION = "model.layers.0.self_attn"
SIZES = [64, 32, 32]
MIXED = {"k_proj": "fp8", "*.layers.0.mlp.up_proj": "bf16", "default": "nvfp4"}


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("main")
    tiny_models.build("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(main: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("second") / "nvfp4"
    return str(second_checkpoints.write(main, folder, factor=1.05))


def recipe_of(source: str, **fields: Any) -> Recipe:
    return resolve({"prefill_model": source, "emulate": True, **fields})


def formats_of(recipe: Recipe, layer: str, sizes: list[int]) -> list[tuple[str, str]]:
    return [(part.label, part.format) for part in lay_out(recipe, layer, sizes, 64)]


def test_without_formats_they_are_the_checkpoints(source: str) -> None:
    recipe = recipe_of(source)
    assert recipe.format == {"default": "nvfp4"}
    parts = formats_of(recipe, f"{ATTENTION}.qkv_proj", SIZES)
    assert {fmt for _, fmt in parts} == {"nvfp4"}
    # What another process resolved means the same.
    assert resolve(recipe.to_dict()) == recipe


def test_a_mapping_decides_for_each_projection(source: str) -> None:
    recipe = recipe_of(source, format=MIXED)
    assert formats_of(recipe, f"{ATTENTION}.qkv_proj", SIZES) == [
        ("q_proj", "nvfp4"),
        ("k_proj", "fp8"),
        ("v_proj", "nvfp4"),
    ]
    gate_up = formats_of(recipe, "model.layers.0.mlp.gate_up_proj", [96, 96])
    assert gate_up == [("gate_proj", "nvfp4"), ("up_proj", "bf16")]
    assert formats_of(recipe, "model.layers.7.mlp.down_proj", [64]) == [("down_proj", "bf16")]


def test_projections_from_the_weights_are_one_part(source: str) -> None:
    recipe = recipe_of(source, format={"k_proj": "fp8", "v_proj": "fp8", "default": "nvfp4"})
    parts = formats_of(recipe, f"{ATTENTION}.qkv_proj", SIZES)
    assert parts == [("q_proj", "nvfp4"), ("k_proj+v_proj", "fp8")]
    whole = recipe_of(source, format={"qkv_proj": "fp8", "default": "nvfp4"})
    assert formats_of(whole, f"{ATTENTION}.qkv_proj", SIZES) == [("q_proj+k_proj+v_proj", "fp8")]


def test_a_projection_of_the_checkpoint_and_one_of_the_weights_are_two_parts(
    main: Path, tmp_path: Path
) -> None:
    """In one format, but one was rounded here and the other there."""
    second = second_checkpoints.write(main, tmp_path / "fp8", "fp8")
    mixed = second_checkpoints.write(main, tmp_path / "mixed")
    stored = load_file(mixed / "model.safetensors")
    other = load_file(second / "model.safetensors")
    name = f"{ATTENTION}.q_proj"
    for key in [key for key in stored if key.startswith(f"{name}.")]:
        del stored[key]
    stored |= {key: value for key, value in other.items() if key.startswith(f"{name}.")}
    save_file(stored, mixed / "model.safetensors")
    config = (mixed / "config.json").read_text()
    group = '"config_groups": {"FP8": ["q_proj"], '
    (mixed / "config.json").write_text(config.replace('"config_groups": {', group))
    recipe = recipe_of(str(mixed), format={"k_proj": "fp8", "default": "nvfp4"})
    assert formats_of(recipe, f"{ATTENTION}.qkv_proj", SIZES) == [
        ("q_proj", "fp8"),
        ("k_proj", "fp8"),
        ("v_proj", "nvfp4"),
    ]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """vLLM's layers want to know which rank they are of."""
    with one_rank(tmp_path):
        yield


def test_each_part_is_multiplied_with_its_own_weights(
    main: Path, source: str, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PhaseQuantizationConfig()
    config.recipe = recipe_of(source, format=MIXED, block_scale="4/6")
    monkeypatch.setattr(passes, "install", lambda method: None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer: Any = QKVParallelLinear(
            64, 16, 4, 2, bias=False, quant_config=config, prefix=f"{ATTENTION}.qkv_proj"
        )
    finally:
        torch.set_default_dtype(before)
    weights = load_file(main / "model.safetensors")
    own = [weights[f"{ATTENTION}.{x}_proj.weight"] for x in "qkv"]
    layer.weight.data.copy_(torch.cat(own))
    layer.quant_method.process_weights_after_loading(layer)
    stored = [opened(source).layer(f"{ATTENTION}.{x}_proj").dequantize() for x in "qkv"]
    expected = [stored[0], fp8.dequantize(*fp8.quantize(own[1])), stored[2]]
    products = [product for _, product in layer.quant_method.products]
    assert len(products) == 3
    for product, matrix in zip(products, expected, strict=True):
        assert isinstance(product, EmulatedProduct)
        found = BY_NAME[product.format].dequantize_weight(product.weight)
        assert torch.equal(found, matrix)
    assert [product.options for product in products] == [  # type: ignore[union-attr]
        {"block_scale": "4/6"},
        {},
        {"block_scale": "4/6"},
    ]
