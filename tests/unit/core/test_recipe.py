"""What the user chooses, as text, and what it comes to on a device."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.core.layer_names import STATE_WRITERS
from mixquant.core.recipe import (
    FORMATS,
    LEAST_ON_CPU,
    LEAST_ON_GPU,
    PRESETS,
    Recipe,
    RecipeError,
    fastest,
)

NOTHING: frozenset[str] = frozenset()
BLACKWELL = frozenset({"nvfp4", "fp8", "int8"})
HOPPER = frozenset({"fp8", "int8"})
CPU = frozenset({"int8"})

names = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_*?.[]0123456789", min_size=1, max_size=12)
recipes = st.builds(
    Recipe,
    preset=st.sampled_from(PRESETS),
    format=st.sampled_from((*FORMATS, "auto"))
    | st.dictionaries(names, st.sampled_from(FORMATS), max_size=4).map(
        lambda mapping: {**mapping, "default": "int8"}
    ),
    min_prefill_tokens=st.none() | st.integers(0, 10**6),
    precise_head=st.none() | st.integers(0, 10**6),
    precise_tail=st.integers(0, 10**6),
    block_scale=st.sampled_from(("6", "4/6")),
    ignore=st.lists(names, max_size=4).map(tuple),
    role=st.sampled_from(("both", "prefill", "decode")),
)
natives = st.frozensets(st.sampled_from(("nvfp4", "fp8", "int8")))


# --- text ------------------------------------------------------------------------------------------


@given(recipes)
def test_json_and_back(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert json.loads(recipe.to_json()) == recipe.to_dict()
    assert set(recipe.to_dict()) == {f.name for f in fields(Recipe)}


@given(recipes, natives)
def test_a_resolved_recipe_survives_json_too(recipe: Recipe, native: frozenset[str]) -> None:
    resolved = recipe.resolved(native)
    assert Recipe.from_json(resolved.to_json()) == resolved


def test_the_order_of_patterns_survives_json() -> None:
    """The first that matches counts."""
    recipe = Recipe(format={"default": "int8", "*.0.*": "bf16", "*proj": "fp8"})
    back = Recipe.from_json(recipe.to_json())
    assert list(back.format) == ["default", "*.0.*", "*proj"]
    assert back.resolved(CPU).format_of("layers.0.q_proj") == "bf16"


def one_line(source: Any, read: Any = Recipe.from_dict) -> str:
    with pytest.raises(RecipeError) as caught:
        read(source)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


@pytest.mark.parametrize("key", ["formats", "min_prefil_tokens", "", "Preset", "default", "k_proj"])
def test_an_unknown_key_is_named(key: str) -> None:
    message = one_line({"preset": "fast", key: "int8"})
    assert repr(key) in message
    for known in fields(Recipe):
        assert known.name in message  # what it might have been


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"preset": "fastest"}, ("preset", "fastest", "balanced")),
        ({"preset": None}, ("preset",)),
        ({"format": "fp4"}, ("format", "fp4", "nvfp4", "int8")),
        ({"format": "FP8"}, ("format", "FP8")),
        ({"format": {"default": "int8", "k_proj": "fp4"}}, ("format", "fp4")),
        ({"format": {"default": "auto"}}, ("format",)),
        ({"format": None}, ("format",)),
        ({"format": 8}, ("format", "8")),
        ({"min_prefill_tokens": -1}, ("min_prefill_tokens", "-1")),
        ({"min_prefill_tokens": 1.0}, ("min_prefill_tokens",)),
        ({"min_prefill_tokens": "16"}, ("min_prefill_tokens", "16")),
        ({"min_prefill_tokens": True}, ("min_prefill_tokens",)),
        ({"precise_head": -4}, ("precise_head", "-4")),
        ({"precise_tail": -1}, ("precise_tail", "-1")),
        ({"precise_tail": None}, ("precise_tail",)),
        ({"block_scale": "4"}, ("block_scale", "4")),
        ({"block_scale": 6}, ("block_scale",)),
        ({"ignore": "lm_head"}, ("ignore", "lm_head")),
        ({"ignore": [1]}, ("ignore",)),
        ({"ignore": None}, ("ignore",)),
        ({"role": "prefil"}, ("role", "prefil", "decode")),
        ({"role": None}, ("role",)),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values: dict[str, Any], named: tuple[str]) -> None:
    message = one_line(values)
    assert all(word in message for word in named), message
    assert one_line(json.dumps(values), Recipe.from_json)


@pytest.mark.parametrize("values", [["fast"], "fast", 3, None])
def test_only_an_object_is_a_recipe(values: Any) -> None:
    one_line(values)
    one_line(json.dumps(values), Recipe.from_json)


@pytest.mark.parametrize("text", ["", "{", "{'preset': 'fast'}", '{"preset": "fast"} x', "\0"])
def test_what_is_no_json_is_no_recipe(text: str) -> None:
    assert "JSON" in one_line(text, Recipe.from_json)


def test_the_constructor_refuses_too() -> None:
    wrong: list[dict[str, Any]] = [{"precise_tail": -1}, {"format": "fp4"}, {"unknown": 1}]
    for values in wrong:
        with pytest.raises((ValueError, TypeError)):
            Recipe(**values)


def test_loading(tmp_path: Path) -> None:
    for preset in PRESETS:
        assert Recipe.load(preset) == Recipe(preset=preset)
    assert Recipe.load(' {"format": "fp8"}') == Recipe(format="fp8")
    file = tmp_path / "recipe.json"
    file.write_text('{"preset": "fast", "ignore": ["lm_head", "*.0.*"]}')
    wanted = Recipe(preset="fast", ignore=("lm_head", "*.0.*"))
    assert Recipe.load(file) == Recipe.load(str(file)) == wanted

    message = one_line("fastt", Recipe.load)
    assert all(word in message for word in ("fastt", *PRESETS))
    one_line(str(tmp_path), Recipe.load)
    one_line(tmp_path / "absent.json", Recipe.load)
    file.write_bytes(b"\xff\xfe{")
    assert "recipe.json" in one_line(file, Recipe.load)
    file.write_text('{"presett": "fast"}')
    message = one_line(file, Recipe.load)
    assert "recipe.json" in message
    assert "presett" in message
    one_line('{"presett": "fast"}', Recipe.load)


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe()
    for f in fields(Recipe):
        with pytest.raises(FrozenInstanceError):
            setattr(recipe, f.name, getattr(recipe, f.name))
    resolved = Recipe(format={"default": "int8"}).resolved(CPU)
    with pytest.raises(FrozenInstanceError):
        resolved.precise_tail = 2  # type: ignore[misc]


def test_resolving_leaves_the_recipe_as_it_was() -> None:
    mapping: dict[str, Any] = {"default": "nvfp4", "k_proj": "bf16"}
    recipe = Recipe(format=mapping)
    resolved = recipe.resolved(BLACKWELL)
    resolved.format["v_proj"] = "bf16"  # type: ignore[index]
    assert mapping == {"default": "nvfp4", "k_proj": "bf16"}
    assert recipe.format == mapping
    assert recipe.precise_head is None


# --- presets and defaults ----------------------------------------------------------------------------


@given(recipes, natives)
def test_resolving_decides_everything_once(recipe: Recipe, native: frozenset[str]) -> None:
    resolved = recipe.resolved(native)
    assert isinstance(resolved.format, dict)
    assert "default" in resolved.format
    assert resolved.precise_head is not None
    for other in (native, NOTHING, BLACKWELL):
        assert resolved.resolved(other) == resolved
    kept = ["preset", "block_scale", "ignore", "role", "everywhere"]
    if recipe.role != "prefill":
        kept += ["precise_tail"]
        kept += ["min_prefill_tokens"] * (recipe.min_prefill_tokens is not None)
        kept += ["precise_head"] * (recipe.precise_head is not None)
    for key in kept:
        assert getattr(resolved, key) == getattr(recipe, key)


def test_the_defaults() -> None:
    recipe = Recipe()
    assert recipe.preset == "balanced"
    assert recipe.format == "auto"
    assert recipe.precise_tail == 1
    assert recipe.block_scale == "6"
    assert recipe.ignore == ("lm_head",)


@pytest.mark.parametrize(
    ("native", "name"),
    [(BLACKWELL, "nvfp4"), (HOPPER, "fp8"), (CPU, "int8"), (NOTHING, "int8"),
     (frozenset({"nvfp4"}), "nvfp4")],
)  # fmt: skip
def test_auto_is_the_fastest_that_is_native(native: frozenset[str], name: str) -> None:
    assert fastest(native) == name
    assert Recipe(preset="fast").resolved(native).format == {"default": name}
    assert Recipe().resolved(native).format_of("layers.0.up_proj") == name


@pytest.mark.parametrize("native", [BLACKWELL, HOPPER, CPU, NOTHING])
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8"])
def test_presets(native: frozenset[str], name: Any) -> None:
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def formats(preset: Any) -> dict[str, str]:
        resolved = Recipe(preset=preset, format=name).resolved(native)
        return {p: resolved.format_of(f"model.layers.3.attn.{p}") for p in projections}

    assert set(formats("fast").values()) == {name}
    assert set(formats("exact").values()) == {"bf16"}
    keys_and_values = name
    if name == "nvfp4":
        keys_and_values = "fp8" if "fp8" in native else "bf16"
    for projection, found in formats("balanced").items():
        wanted = keys_and_values if projection in ("k_proj", "v_proj") else name
        assert found == wanted, projection


def test_balanced_spares_whatever_writes_the_state() -> None:
    """Latent attention's keys and values and gated delta nets' inputs, not only k and v."""
    resolved = Recipe(format="nvfp4").resolved(BLACKWELL)
    for writer in ("k_proj", "v_proj", "kv_b_proj", "in_proj_qkv", "in_proj_b"):
        assert writer in STATE_WRITERS
        assert resolved.format_of(f"layers.0.attn.{writer}") == "fp8"
    assert resolved.format_of("layers.0.linear_attn.out_proj") == "nvfp4"
    assert resolved.format_of("layers.0.linear_attn.in_proj_z") == "nvfp4"


def test_exact_quantizes_nothing_whatever_the_format() -> None:
    names: list[Any] = ["nvfp4", "auto", {"default": "int8", "q_proj": "fp8"}]
    for name in names:
        resolved = Recipe(preset="exact", format=name).resolved(BLACKWELL)
        assert set(resolved.format.values()) == {"bf16"}  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "head"), [("nvfp4", 4), ("fp8", 0), ("int8", 0)])
def test_the_precise_head_goes_by_format(name: Any, head: int) -> None:
    resolved = Recipe(preset="fast", format=name).resolved(NOTHING)
    assert (resolved.precise_head, resolved.precise_tail) == (head, 1)
    assert resolved.min_prefill_tokens == LEAST_ON_CPU == 128
    on_gpu = Recipe(preset="fast", format=name).resolved(NOTHING, on_gpu=True)
    assert on_gpu.min_prefill_tokens == LEAST_ON_GPU == 704
    # Of several formats, the most careful.
    mixed = Recipe(format={"default": "int8", "q_proj": name}).resolved(NOTHING)
    assert mixed.precise_head == head
    # What the user says stands, zero too.
    said = Recipe(format=name, precise_head=0, min_prefill_tokens=0).resolved(NOTHING)
    assert (said.precise_head, said.min_prefill_tokens) == (0, 0)


@given(recipes, natives)
def test_a_prefill_engine_has_the_formats_of_one_engine_and_no_precise_row(
    recipe: Recipe, native: frozenset[str]
) -> None:
    one, prefill = (replace(recipe, role=role).resolved(native) for role in ("both", "prefill"))
    assert prefill.format == one.format
    assert (prefill.precise_head, prefill.precise_tail, prefill.min_prefill_tokens) == (0, 0, 0)


@given(recipes, natives)
def test_a_decode_engine_quantizes_nothing_and_needs_no_second_checkpoint(
    recipe: Recipe, native: frozenset[str]
) -> None:
    decode = replace(recipe, role="decode", prefill_model="elsewhere").resolved(native)
    assert (decode.format, decode.prefill_model) == ({"default": "bf16"}, None)
    prefill = replace(recipe, role="prefill", prefill_model="elsewhere").resolved(native)
    assert prefill.prefill_model == "elsewhere"


# --- which layer -------------------------------------------------------------------------------------


def test_formats_per_projection() -> None:
    recipe = Recipe(format={"default": "nvfp4", "k_proj": "bf16", "v_proj": "bf16"})
    for native in (BLACKWELL, NOTHING):
        resolved = recipe.resolved(native)
        assert resolved.format_of("model.layers.0.self_attn.k_proj") == "bf16"
        assert resolved.format_of("v_proj") == "bf16"
        assert resolved.format_of("model.layers.0.self_attn.q_proj") == "nvfp4"
        assert resolved.format_of("model.layers.0.k_proj.up") == "nvfp4"  # not its last component
    with pytest.raises(RecipeError, match="default"):
        Recipe(format={"k_proj": "bf16"}).resolved(BLACKWELL)


def test_patterns() -> None:
    recipe = Recipe(
        format={
            "*.layers.0.*": "bf16",
            "[kv]_proj": "fp8",
            "*_proj": "int8",
            "default": "nvfp4",
            "o_proj": "bf16",  # too late: a pattern before it matches
        }
    ).resolved(BLACKWELL)
    assert recipe.format_of("model.layers.0.self_attn.k_proj") == "bf16"
    assert recipe.format_of("model.layers.10.self_attn.k_proj") == "fp8"
    assert recipe.format_of("model.layers.1.self_attn.o_proj") == "int8"
    assert recipe.format_of("model.layers.1.mlp.router") == "nvfp4"
    assert recipe.format_of("model.layers.1.self_attn.K_PROJ") == "nvfp4"


def test_ignored_layers() -> None:
    recipe = Recipe(format="int8", ignore=("lm_head", "*.layers.[01].*", "down_proj")).resolved(CPU)
    for layer in ("lm_head", "model.lm_head", "model.layers.1.mlp.up_proj", "a.b.down_proj"):
        assert recipe.ignores(layer)
        assert recipe.format_of(layer) == "bf16"
    for layer in ("lm_head_2", "model.layers.2.mlp.up_proj", "down_proj.a"):
        assert not recipe.ignores(layer)
        assert recipe.format_of(layer) == "int8"
    # Before any format that is given by name.
    both = Recipe(format={"default": "int8", "lm_head": "fp8"}).resolved(CPU)
    assert both.format_of("lm_head") == "bf16"
    everything = Recipe(format="int8", ignore=()).resolved(CPU)
    assert everything.format_of("lm_head") == "int8"


def test_fused_layers_have_their_projections_formats() -> None:
    recipe = Recipe(
        format={"default": "nvfp4", "k_proj": "bf16", "v_proj": "fp8", "*.0.mlp.up_proj": "int8"}
    ).resolved(BLACKWELL)
    attention = "model.layers.0.self_attn.qkv_proj"
    assert recipe.formats_of_fused(attention) == ("nvfp4", "bf16", "fp8")
    assert recipe.formats_of_fused("qkv_proj") == ("nvfp4", "bf16", "fp8")
    # Patterns see the full names that the projections would have.
    assert recipe.formats_of_fused("model.layers.0.mlp.gate_up_proj") == ("nvfp4", "int8")
    assert recipe.formats_of_fused("model.layers.1.mlp.gate_up_proj") == ("nvfp4", "nvfp4")
    assert recipe.formats_of_fused("model.layers.0.self_attn.o_proj") is None


def test_a_fused_layer_can_be_spoken_of_itself() -> None:
    recipe = Recipe(
        format={"default": "int8", "qkv_proj": "fp8", "k_proj": "bf16"}, ignore=("gate_up_proj",)
    ).resolved(CPU)
    assert recipe.formats_of_fused("layers.0.qkv_proj") is None
    assert recipe.format_of("layers.0.qkv_proj") == "fp8"
    assert recipe.formats_of_fused("layers.0.gate_up_proj") is None
    assert recipe.format_of("layers.0.gate_up_proj") == "bf16"


def test_projections_that_are_ignored_stay_bf16_in_a_fused_layer() -> None:
    recipe = Recipe(format="int8", ignore=("lm_head", "k_proj", "*.0.mlp.up_proj")).resolved(CPU)
    assert recipe.formats_of_fused("layers.3.qkv_proj") == ("int8", "bf16", "int8")
    assert recipe.formats_of_fused("model.0.mlp.gate_up_proj") == ("int8", "bf16")


def test_balanced_reaches_into_fused_layers() -> None:
    resolved = Recipe(format="nvfp4").resolved(BLACKWELL)
    assert resolved.formats_of_fused("layers.0.qkv_proj") == ("nvfp4", "fp8", "fp8")


# --- settings without effect ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"preset": "fast", "preset": "exact"}', "preset"),
        ('{"format": {"default": "int8", "k_proj": "bf16", "k_proj": "fp8"}}', "k_proj"),
        ('{"ignore": [], "emulate": true, "ignore": ["a"]}', "ignore"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    for source in (text, str(tmp_path / "recipe.json")):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(RecipeError, match=f"{key!r} appears twice"):
            Recipe.load(source)


LAYERS = [
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
]
OTHERS = ["lm_head", "model.layers.0.mlp.gate", "visual.blocks.0.attn.qkv"]


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, []),
        ({"ignore": ["lm_head", "*", "k_*", "qkv_proj"]}, []),
        ({"ignore": ["gate", "visual.*"]}, []),
        ({"ignore": ["kproj", "K_proj", "model.layers.0", "k_proj"]}, ["kproj", "K_proj"]),
        ({"ignore": ["lm_haed", "lm_haed"]}, ["lm_haed"]),
        ({"format": {"default": "int8", "*.layers.0.*": "fp8", "down_proj": "bf16"}}, []),
        ({"format": {"default": "int8", "*.layers.1.*": "fp8"}}, ["*.layers.1.*"]),
        ({"format": {"default": "int8", "*proj": "fp8", "k_proj": "bf16"}}, ["k_proj"]),
        ({"ignore": ["k_*"], "format": {"default": "int8", "k_proj": "bf16"}}, ["k_proj"]),
        ({"format": {"default": "int8", "lm_head": "fp8", "gate": "bf16"}}, ["lm_head"]),
        ({"preset": "exact", "ignore": ["kproj"]}, []),
        ({"role": "decode", "ignore": ["kproj"]}, []),
    ],
)
def test_patterns_that_decide_about_nothing_are_named(
    recipe: dict[str, Any], named: list[str]
) -> None:
    given = Recipe.from_dict(recipe)
    found = given.patterns_without_effect(LAYERS, OTHERS)
    if "model.layers.0" in given.ignore:  # a folder of layers, and the name of none
        named = [*named, "model.layers.0"]
    assert sorted(re.findall(r"'(?:ignore|format)': '([^']+)'", " ".join(found))) == sorted(named)


def test_what_a_preset_adds_is_not_named() -> None:
    resolved = Recipe(format="nvfp4").resolved(BLACKWELL)
    assert "k_proj" in resolved.format
    assert resolved.patterns_without_effect(["transformer.h.0.mlp.c_fc"]) == []


@pytest.mark.parametrize(
    ("recipe", "native", "key"),
    [
        ({"preset": "exact", "format": "int8"}, CPU, "format"),
        ({"preset": "exact", "format": {"default": "bf16", "x": "fp8"}}, CPU, "format"),
        ({"preset": "exact", "everywhere": True}, CPU, "everywhere"),
        ({"block_scale": "4/6"}, HOPPER, "block_scale"),
        ({"block_scale": "4/6"}, BLACKWELL, None),
        ({"block_scale": "4/6", "role": "decode"}, BLACKWELL, None),
        ({"preset": "exact", "format": "bf16"}, CPU, None),
        ({"preset": "exact"}, CPU, None),
        ({"everywhere": True, "min_prefill_tokens": 3}, CPU, None),
    ],
)
def test_keys_that_change_nothing_are_named(
    recipe: dict[str, Any], native: frozenset[str], key: str | None
) -> None:
    given = Recipe.from_dict(recipe)
    found = given.settings_without_effect(given.resolved(native))
    assert len(found) == (key is not None)
    assert all(f"recipe key {key!r} changes nothing" in one for one in found)
