"""Reading checkpoints in the compressed-tensors format: what is refused, and what a layer holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixquant.checkpoints.compressed_tensors import CompressedTensors
from mixquant.checkpoints.errors import CheckpointError, ModelError
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.formats import nvfp4, nvfp4_blocks

Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _refused(directory: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        CompressedTensors.open(directory)
    assert isinstance(caught.value, ModelError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLayers:
    def test_nvfp4(self, main: Path, second: Callable[..., Path]) -> None:
        checkpoint = CompressedTensors.open(second())
        assert len(checkpoint.formats) == 14
        assert set(checkpoint.formats.values()) == {"nvfp4"}
        layer = checkpoint.layer(Q_PROJ)
        assert isinstance(layer, Nvfp4Tensors)
        weight = load_file(main / "model.safetensors")[f"{Q_PROJ}.weight"]
        assert layer.shape == tuple(weight.shape)
        scale = nvfp4_blocks.global_scale(weight.abs().amax().float())
        assert torch.equal(layer.global_scale, scale.reshape(1))
        codes, scales = nvfp4_blocks.quantize(weight, scale)
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
        checkpoint = CompressedTensors.open(second("fp8", change, {"strategy": strategy}))
        layer = checkpoint.layer(name)
        assert isinstance(layer, Fp8Tensors)
        assert layer.scale.dtype == torch.float32
        assert layer.scale.shape == (32, 1)
        expected = layer.codes.float() * scale.float().reshape(-1, 1)
        assert torch.equal(layer.dequantize(), expected)

    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    def test_shards(self, second: Callable[..., Path], fmt: str) -> None:
        layer = CompressedTensors.open(second(fmt)).layer("model.layers.0.mlp.down_proj")
        whole = layer.dequantize()
        assert whole.shape == (64, 96)
        assert torch.equal(layer.rows(16, 48).dequantize(), whole[16:48])
        assert torch.equal(layer.columns(48, 96).dequantize(), whole[:, 48:96])
        part = layer.rows(0, 32).columns(16, 32)
        assert part.shape == (32, 16)
        assert torch.equal(part.dequantize(), whole[:32, 16:32])

    @pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
    def test_ranges(self, second: Callable[..., Path], fmt: str) -> None:
        layer = CompressedTensors.open(second(fmt)).layer(Q_PROJ)
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
            CompressedTensors.open(second()).layer("lm_head")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
    def test_impossible_scale(self, second: Callable[..., Path], value: float) -> None:
        def change(tensors: Tensors) -> None:
            tensors[f"{Q_PROJ}.weight_global_scale"] = torch.tensor([value])

        checkpoint = CompressedTensors.open(second(tensors=change))
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
        layer = CompressedTensors.open(directory).layer(Q_PROJ)
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
        assert "cannot be downloaded from the Hugging Face Hub" in _refused("nobody/has-this-one")

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
        assert set(CompressedTensors.open(directory).formats.values()) == {fmt}

    def test_quantization_within_the_text_s_configuration(
        self, second: Callable[..., Path]
    ) -> None:
        directory = second()
        config = json.loads((directory / "config.json").read_text())
        nested = {"quantization_config": config.pop("quantization_config")}
        (directory / "config.json").write_text(json.dumps(config | {"text_config": nested}))
        assert set(CompressedTensors.open(directory).formats.values()) == {"nvfp4"}

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

    @pytest.mark.parametrize(
        ("part", "value", "says"),
        [
            ("weight_scale", None, "has no weight_scale"),
            ("weight_global_scale", None, "has no weight_global_scale"),
            ("weight_packed", torch.zeros(64, 8, dtype=torch.int32), "of the type I32"),
            ("weight_scale", torch.zeros(64, 4), "of the type F32"),
            ("weight_scale", torch.zeros(64, 2).to(torch.float8_e4m3fn), "with scales [64, 2]"),
            ("weight_global_scale", torch.ones(3), "of the shape [3]"),
            ("weight_packed", torch.zeros(64, dtype=torch.uint8), "not a matrix"),
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
