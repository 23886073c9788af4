"""Reading the second checkpoint; that it is the main model, quantized, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixquant.checkpoints.models import ModelError
from mixquant.checkpoints.prefill import (
    CheckpointError,
    Fp8Tensors,
    Nvfp4Tensors,
    PrefillCheckpoint,
)
from mixquant.formats import fp8, nvfp4

Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.post_attention_layernorm.weight"

NVFP4_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
}
FP8_WEIGHTS: dict[str, Any] = {
    **NVFP4_WEIGHTS,
    "num_bits": 8,
    "strategy": "channel",
    "group_size": None,
}


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in BF16: the main model."""
    directory = tmp_path_factory.mktemp("main")
    tiny_models.build("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def second(main: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the main model as a compressed-tensors checkpoint, with something changed."""

    def write(
        fmt: str = "nvfp4",
        tensors: Callable[[Tensors], Any] = lambda tensors: None,
        weights: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        directory = tmp_path / "second"
        directory.mkdir()
        content = _quantized(load_file(main / "model.safetensors"), fmt)
        tensors(content)
        save_file(content, directory / "model.safetensors")
        scheme = {**(NVFP4_WEIGHTS if fmt == "nvfp4" else FP8_WEIGHTS), **(weights or {})}
        written = json.loads((main / "config.json").read_text()) | (config or {})
        written["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized" if fmt == "nvfp4" else "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            **(quantization or {}),
        }
        (directory / "config.json").write_text(json.dumps(written))
        return directory

    return write


def _quantized(tensors: Tensors, fmt: str) -> Tensors:
    result: Tensors = {}
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if "proj" not in name:
            result[name] = weight
        elif fmt == "nvfp4":
            scale = nvfp4.global_scale(weight.abs().amax().float())
            codes, scales = nvfp4.quantize(weight, scale)
            result[f"{layer}.weight_packed"] = codes
            result[f"{layer}.weight_scale"] = scales
            result[f"{layer}.weight_global_scale"] = scale.reshape(1)
            result[f"{layer}.input_global_scale"] = torch.ones(1)
        else:
            result[name], result[f"{layer}.weight_scale"] = fp8.quantize(weight)
    return result


def _config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def _refused(directory: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        PrefillCheckpoint.open(directory)
    return _one_line(caught.value)


def _one_line(error: Exception) -> str:
    assert isinstance(error, ModelError)  # which the command line prints as one line
    assert "\n" not in str(error)
    return str(error)


class TestLayers:
    def test_nvfp4(self, main: Path, second: Callable[..., Path]) -> None:
        checkpoint = PrefillCheckpoint.open(second())
        assert len(checkpoint.formats) == 14
        assert set(checkpoint.formats.values()) == {"nvfp4"}
        layer = checkpoint.layer(Q_PROJ)
        assert isinstance(layer, Nvfp4Tensors)
        weight = load_file(main / "model.safetensors")[f"{Q_PROJ}.weight"]
        assert layer.shape == tuple(weight.shape)
        scale = nvfp4.global_scale(weight.abs().amax().float())
        assert torch.equal(layer.global_scale, scale.reshape(1))
        codes, scales = nvfp4.quantize(weight, scale)
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.block_scales.view(torch.uint8), scales.view(torch.uint8))
        ours = nvfp4.NVFP4.quantize_weight(weight, nvfp4.EMULATION)
        assert torch.equal(layer.dequantize(), nvfp4.NVFP4.dequantize_weight(ours))

    @pytest.mark.parametrize("shape", [(32, 1), (32,), (1,), (), (1, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fp8(
        self, second: Callable[..., Path], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        name = "model.layers.0.self_attn.k_proj"
        scale = torch.rand(shape).to(dtype) + 1

        def change(tensors: Tensors) -> None:
            tensors[f"{name}.weight_scale"] = scale

        strategy = "channel" if scale.numel() > 1 else "tensor"
        checkpoint = PrefillCheckpoint.open(second("fp8", change, {"strategy": strategy}))
        layer = checkpoint.layer(name)
        assert isinstance(layer, Fp8Tensors)
        assert layer.scale.dtype == torch.float32
        assert layer.scale.shape == (32, 1)
        expected = layer.codes.float() * scale.float().reshape(-1, 1)
        assert torch.equal(layer.dequantize(), expected)

    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    def test_shards(self, second: Callable[..., Path], fmt: str) -> None:
        layer = PrefillCheckpoint.open(second(fmt)).layer("model.layers.0.mlp.down_proj")
        whole = layer.dequantize()
        assert whole.shape == (64, 96)
        assert torch.equal(layer.rows(16, 48).dequantize(), whole[16:48])
        assert torch.equal(layer.columns(48, 96).dequantize(), whole[:, 48:96])
        part = layer.rows(0, 32).columns(16, 32)
        assert part.shape == (32, 16)
        assert torch.equal(part.dequantize(), whole[:32, 16:32])

    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    def test_ranges(self, second: Callable[..., Path], fmt: str) -> None:
        layer = PrefillCheckpoint.open(second(fmt)).layer(Q_PROJ)
        for start, stop in [(-1, 16), (0, 65), (16, 16), (32, 16)]:
            with pytest.raises(ValueError, match="no range within 64"):
                layer.rows(start, stop)
            with pytest.raises(ValueError, match="no range within 64"):
                layer.columns(start, stop)
        if fmt == "nvfp4":
            for start, stop in [(8, 16), (0, 24)]:
                with pytest.raises(ValueError, match="boundaries of blocks of 16"):
                    layer.columns(start, stop)

    def test_no_such_layer(self, second: Callable[..., Path]) -> None:
        with pytest.raises(CheckpointError, match="holds no quantized layer lm_head"):
            PrefillCheckpoint.open(second()).layer("lm_head")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
    def test_impossible_scale(self, second: Callable[..., Path], value: float) -> None:
        def change(tensors: Tensors) -> None:
            tensors[f"{Q_PROJ}.weight_global_scale"] = torch.tensor([value])

        checkpoint = PrefillCheckpoint.open(second(tensors=change))
        with pytest.raises(CheckpointError, match=r"damaged.*q_proj has a scale"):
            checkpoint.layer(Q_PROJ)

    def test_several_files(self, second: Callable[..., Path]) -> None:
        directory = second()
        whole = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(whole)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in shards.items():
            save_file({name: whole[name] for name in held}, directory / file)
        save_file({"same.again": torch.zeros(1)}, directory / "consolidated.safetensors")
        index = {name: file for file, held in shards.items() for name in held}
        index_file = directory / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": index}))
        layer = PrefillCheckpoint.open(directory).layer(Q_PROJ)
        assert isinstance(layer, Nvfp4Tensors)
        assert torch.equal(layer.codes, whole[f"{Q_PROJ}.weight_packed"])

        (directory / "model-2.safetensors").unlink()
        assert "cannot read model-2.safetensors" in _refused(directory)
        index_file.write_text("{}")
        assert "cannot read model.safetensors.index.json" in _refused(directory)


class TestOpen:
    def test_no_such_directory(self) -> None:
        assert "no such directory" in _refused("/no/such/directory")

    def test_hub_name_that_cannot_be_fetched(self) -> None:
        assert "hub gave none" in _refused("nobody/has-this-one")

    def test_not_quantized(self, main: Path) -> None:
        assert "is not quantized" in _refused(main)

    def test_other_method(self, second: Callable[..., Path]) -> None:
        quantization = {"quant_method": "modelopt"}
        assert "is quantized by modelopt" in _refused(second(quantization=quantization))

    def test_broken_config(self, second: Callable[..., Path]) -> None:
        directory = second()
        for text in ("{", "[]"):
            (directory / "config.json").write_text(text)
            assert "its config.json" in _refused(directory)
        (directory / "config.json").unlink()
        assert "holds no config.json" in _refused(directory)

    @pytest.mark.parametrize(
        ("weights", "says"),
        [
            (
                {"type": "int", "strategy": "group", "group_size": 128},
                "int4 weights (group of 128)",
            ),
            ({"type": "int", "num_bits": 8, "strategy": "channel"}, "int8 weights"),
            ({"group_size": 32, "strategy": "group"}, "float4 weights (group of 32)"),
            ({"group_size": 32}, "float4 weights (tensor_group of 32)"),
            (
                {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
                "float8 weights (block",
            ),
            ({"symmetric": False}, "asymmetric"),
            ({"actorder": "group"}, "actorder group"),
        ],
    )
    def test_unsupported_scheme(
        self, second: Callable[..., Path], weights: dict[str, Any], says: str
    ) -> None:
        refused = _refused(second(weights=weights))
        assert says in refused
        assert "only NVFP4, and FP8" in refused

    @pytest.mark.parametrize(
        ("quantization", "says"),
        [
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
            ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated weights"),
            ({"config_groups": {}}, "does not name"),
            ({"config_groups": None}, "does not name"),
            ({"config_groups": {"W4A16": ["Linear"]}}, "weights in the scheme 'W4A16'"),
            ({"config_groups": {"FP8": ["Linear"]}}, "stored as nvfp4, which its config.json does"),
            ({"config_groups": ["Linear"]}, "quantization_config: config_groups: "),
            ({"config_groups": {"a": "FP8"}}, "config_groups.a: "),
            ({"config_groups": {"a": {"weights": "FP8"}}}, "config_groups.a.weights: "),
            ({"config_groups": {"a": {"weights": {"num_bits": []}}}}, "a.weights.num_bits: "),
            ({"sparsity_config": "dense"}, "sparsity_config: "),
            ({"sparsity_config": {"format": ["dense"]}}, "sparsity_config.format: "),
            ({"transform_config": "none"}, "transform_config: "),
            ({"quant_method": ["x"]}, "is quantized by "),
        ],
    )
    def test_unsupported_configuration(
        self, second: Callable[..., Path], quantization: dict[str, Any], says: str
    ) -> None:
        assert says in _refused(second(quantization=quantization))

    @pytest.mark.parametrize(
        ("fmt", "scheme"),
        [("nvfp4", "NVFP4"), ("nvfp4", "NVFP4A16"), ("fp8", "FP8"), ("fp8", "FP8_DYNAMIC")],
    )
    def test_groups_named_by_their_scheme(
        self, second: Callable[..., Path], fmt: str, scheme: str
    ) -> None:
        directory = second(fmt, quantization={"config_groups": {scheme: ["Linear"]}})
        assert set(PrefillCheckpoint.open(directory).formats.values()) == {fmt}

    def test_quantization_within_the_text_s_configuration(
        self, second: Callable[..., Path]
    ) -> None:
        directory = second()
        config = _config(directory)
        nested = {"quantization_config": config.pop("quantization_config")}
        (directory / "config.json").write_text(json.dumps(config | {"text_config": nested}))
        assert set(PrefillCheckpoint.open(directory).formats.values()) == {"nvfp4"}

    @pytest.mark.parametrize(
        ("index", "says"),
        [
            ({"weight_map": {"x": 5}}, "weight_map.x: "),
            ({"weight_map": ["x"]}, "weight_map: "),
            ({}, "weight_map: Field required"),
            ({"weight_map": {"x": "\0"}}, "cannot read "),
            ({"weight_map": {"x": "x" * 5_000}}, "cannot read "),
        ],
    )
    def test_broken_index(
        self, second: Callable[..., Path], index: dict[str, Any], says: str
    ) -> None:
        directory = second()
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        refused = _refused(directory)
        assert says in refused
        assert len(refused) < 1_000

    def test_kv_cache_scheme(self, second: Callable[..., Path], main: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        directory = second(tensors=change, quantization={"kv_cache_scheme": scheme})
        PrefillCheckpoint.open(directory).check_against(_config(main), main)

    @pytest.mark.parametrize(
        ("part", "value", "says"),
        [
            ("weight_scale", None, "has no weight_scale"),
            ("weight_global_scale", None, "has no weight_global_scale"),
            ("weight_packed", torch.zeros(64, 8, dtype=torch.int32), "of the type I32"),
            ("weight_scale", torch.zeros(64, 4), "of the type F32"),
            ("weight_scale", torch.zeros(64, 2).to(torch.float8_e4m3fn), "with scales [64, 2]"),
            ("weight_global_scale", torch.ones(3), "of the shape [3]"),
            ("weight_packed", torch.zeros(64, dtype=torch.uint8), "no matrix"),
            ("weight_g_idx", torch.zeros(64), "has a weight_g_idx"),
        ],
    )
    def test_malformed_layer(
        self, second: Callable[..., Path], part: str, value: Tensor | None, says: str
    ) -> None:
        def change(tensors: Tensors) -> None:
            tensors.pop(f"{Q_PROJ}.{part}", None)
            if value is not None:
                tensors[f"{Q_PROJ}.{part}"] = value

        refused = _refused(second(tensors=change))
        assert f"damaged: {Q_PROJ} " in refused
        assert says in refused

    def test_int8_weight_under_an_fp8_scheme(self, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            tensors[f"{Q_PROJ}.weight"] = torch.zeros(64, 64, dtype=torch.int8)

        assert "of the type I8" in _refused(second("fp8", change))

    def test_nothing_quantized(self, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if "proj" in name]:
                del tensors[name]

        assert "holds no quantized layer" in _refused(second(tensors=change))

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_damaged_file(self, second: Callable[..., Path], damage: str) -> None:
        directory = second()
        file = directory / "model.safetensors"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
            assert "cannot read model.safetensors" in _refused(directory)
        else:
            file.unlink()
            assert "holds no safetensors files" in _refused(directory)


class TestCheckAgainst:
    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    def test_fits(self, main: Path, second: Callable[..., Path], fmt: str) -> None:
        checkpoint = PrefillCheckpoint.open(second(fmt))
        checkpoint.check_against(_config(main))
        checkpoint.check_against(_config(main), main)

    @pytest.mark.parametrize(
        "key", ["model_type", "hidden_size", "num_hidden_layers", "vocab_size", "head_dim"]
    )
    def test_other_architecture(self, main: Path, second: Callable[..., Path], key: str) -> None:
        checkpoint = PrefillCheckpoint.open(second())
        with pytest.raises(CheckpointError, match=f"its {key} is .* the main model's 'other'"):
            checkpoint.check_against({**_config(main), key: "other"})

    def test_nested_configuration(self, main: Path, second: Callable[..., Path]) -> None:
        checkpoint = PrefillCheckpoint.open(second())
        text = _config(main)
        checkpoint.check_against({"model_type": "a_vision_model", "text_config": text})
        with pytest.raises(CheckpointError, match="its intermediate_size is 96"):
            checkpoint.check_against({"text_config": {**text, "intermediate_size": 128}})

    def _misfit(self, main: Path, directory: Path) -> str:
        checkpoint = PrefillCheckpoint.open(directory)
        checkpoint.check_against(_config(main))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_against(_config(main), main)
        said = _one_line(caught.value)
        assert "does not fit the main model" in said
        return said

    @pytest.mark.parametrize("name", [NORM, "model.norm.weight", "model.embed_tokens.weight"])
    def test_one_bit_of_a_small_tensor(
        self, main: Path, second: Callable[..., Path], name: str
    ) -> None:
        def change(tensors: Tensors) -> None:
            tensors[name].view(torch.int16).view(-1)[5] ^= 1

        said = self._misfit(main, second(tensors=change))
        assert f"{name} differs" in said
        assert "SmoothQuant" in said

    def test_a_large_embedding_by_a_sample_of_rows(
        self, main: Path, second: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def change(tensors: Tensors) -> None:
            tensors["model.embed_tokens.weight"] *= 1.5

        monkeypatch.setattr("mixquant.checkpoints.prefill._WHOLE_UP_TO", 1000)
        directory = second(tensors=change)
        assert "model.embed_tokens.weight differs" in self._misfit(main, directory)

    def test_cast_tensor_is_the_same(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            tensors[NORM] = tensors[NORM].float()

        PrefillCheckpoint.open(second(tensors=change)).check_against(_config(main), main)

    @pytest.mark.parametrize("layer", [Q_PROJ, None])
    def test_missing(self, main: Path, second: Callable[..., Path], layer: str | None) -> None:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.startswith(layer or NORM)]:
                del tensors[name]

        expected = f"{layer}.weight" if layer else NORM
        assert f"it lacks {expected}" in self._misfit(main, second(tensors=change))

    def test_unquantized_layer(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.startswith(Q_PROJ)]:
                del tensors[name]
            whole = load_file(main / "model.safetensors")
            tensors[f"{Q_PROJ}.weight"] = whole[f"{Q_PROJ}.weight"]

        checkpoint = PrefillCheckpoint.open(second(tensors=change))
        assert Q_PROJ not in checkpoint.formats
        checkpoint.check_against(_config(main), main)

    def test_added_bias(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            tensors[f"{Q_PROJ}.bias"] = torch.zeros(64)

        said = self._misfit(main, second(tensors=change))
        assert f"the main model has no {Q_PROJ}.bias" in said

    def test_added_layer(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.startswith("model.layers.1.")]:
                tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()

        said = self._misfit(main, second(tensors=change))
        assert "the main model has no layer model.layers.2" in said

    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    @pytest.mark.parametrize("other", ["scaled", "permuted", "NaN"])
    def test_other_weights(
        self, main: Path, second: Callable[..., Path], fmt: str, other: str
    ) -> None:
        # What AWQ does between v_proj and o_proj touches no norm.
        def change(tensors: Tensors) -> None:
            codes = tensors[f"{Q_PROJ}.weight_packed" if fmt == "nvfp4" else f"{Q_PROJ}.weight"]
            scale = f"{Q_PROJ}.weight_global_scale" if fmt == "nvfp4" else f"{Q_PROJ}.weight_scale"
            if other == "permuted":
                codes.view(torch.uint8).copy_(codes.view(torch.uint8).flip(1).clone())
            else:
                tensors[scale] *= 1.5 if other == "scaled" else float("nan")

        said = self._misfit(main, second(fmt, change))
        assert f"the weight of {Q_PROJ} is not the main model's" in said

    def test_other_shape(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            for part in ("packed", "scale"):
                name = f"{Q_PROJ}.weight_{part}"
                tensors[name] = tensors[name][:32].contiguous()

        said = self._misfit(main, second(tensors=change))
        assert f"the weight of {Q_PROJ} is [32, 64], in the main model [64, 64]" in said

    def test_tied_head(self, main: Path, second: Callable[..., Path]) -> None:
        def change(tensors: Tensors) -> None:
            del tensors["lm_head.weight"]

        directory = second(tensors=change)
        assert "it lacks lm_head.weight" in self._misfit(main, directory)
        config = _config(directory)
        (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        PrefillCheckpoint.open(directory).check_against(_config(main), main)
