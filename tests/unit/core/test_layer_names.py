"""What names say of layers: towers and drafters as vLLM calls them, and a decoder's layers."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixquant.core.layer_names import from_layers, is_tower

# Of models whose "tower" takes token rows, or is the decoder itself; and prefixes of one letter's worth.
NO_TOWERS = {"encoder", "model.encoder", "model.embed_tokens_extend", "vision_tower"}


def names_of_towers() -> Iterator[str]:
    """What vLLM's multimodal models say of their towers and connectors (`MultiModelKeys`)."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("vLLM is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model_executor" / "models"
    for file in sorted(folder.glob("*.py")):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if "MultiModelKeys" in text else ():
            if not (
                isinstance(node, ast.Call) and ast.unparse(node.func).startswith("MultiModelKeys")
            ):
                continue
            for keyword in node.keywords:
                if keyword.arg not in ("connector", "tower_model"):
                    continue
                for constant in ast.walk(keyword.value):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        yield constant.value


def test_vllms_towers_are_known() -> None:
    names = {name.removesuffix(".") for name in names_of_towers()}
    assert len(names) > 20
    unknown = {name for name in names - NO_TOWERS if not is_tower(f"{name}.layers.0.mlp.fc1")}
    assert not unknown


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.gate_proj", "lm_head", "language_model.model.layers.3.self_attn.qkv"],
)
def test_a_decoders_layers_are_no_towers(name: str) -> None:
    assert not is_tower(name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.mlp", "layers.0.mlp"),
        ("language_model.model.layers.7.mlp", "layers.7.mlp"),
        ("layers.1.mlp", "layers.1.mlp"),
        ("vpm.encoder.layers.0.mlp", "vpm.encoder.layers.0.mlp"),
        ("model.encoder.layers.0.mlp", "model.encoder.layers.0.mlp"),
        ("lm_head", "lm_head"),
    ],
)
def test_names_from_a_decoders_layers_on(name: str, found: str) -> None:
    assert from_layers(name) == found
