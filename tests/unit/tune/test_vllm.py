"""The file of a tuned recipe in the vLLM plugin: every layer has the format that was chosen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from mixquant.core.recipe import FormatName
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.linear.layout import lay_out
from mixquant.engines.vllm.settings import resolve
from mixquant.tune.choice import Choice
from mixquant.tune.units import Unit, Units

FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8", "bf16")
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


@pytest.mark.parametrize("before", ["model", "language_model.model"])
def test_the_file_in_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str) -> None:
    """vLLM has fused layers, and models of several parts have other names before their layers."""
    native = frozenset({"nvfp4", "fp8"})
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (native, "this GPU"))
    monkeypatch.setattr(hardware, "is_gpu", lambda: True)
    names = [
        f"layers.{n}.{layer.rpartition('.')[0]}.{name}"
        for n in range(12)
        for layer, parts in FUSED.items()
        for name in parts
    ]
    found = Units(tuple(Unit(f"model.language_model.{n}", "", (0, 64), 1) for n in names), 0)
    chosen = dict(zip(names, random.Random(5).choices(FORMATS, k=len(names)), strict=True))
    file = tmp_path / "recipe.json"
    file.write_text(Choice(tuple(chosen.values()), "4/6", 4, 64).recipe(found, "nvfp4").to_json())
    recipe = resolve(str(file))
    assert (recipe.precise_head, recipe.precise_tail, recipe.block_scale) == (4, 64, "4/6")
    for n in range(12):
        for layer, parts in FUSED.items():
            slices = lay_out(recipe, f"{before}.layers.{n}.{layer}", [64] * len(parts), 64)
            shown = {name: one.format for one in slices for name, _ in one.projections}
            path = f"layers.{n}.{layer.rpartition('.')[0]}"
            assert shown == {name: chosen[f"{path}.{name}"] for name in parts}
