"""The second checkpoint is refused unless it is the main model, quantized, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.prefill import PrefillCheckpoint, check_is_of
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.formats import fp8, nvfp4_blocks

Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.post_attention_layernorm.weight"


def _config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


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
        said = str(caught.value)
        assert "\n" not in said
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

    def test_kv_cache_scheme(self, second: Callable[..., Path], main: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        directory = second(tensors=change, quantization={"kv_cache_scheme": scheme})
        PrefillCheckpoint.open(directory).check_against(_config(main), main)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_a_weight_is_told_from_others_and_from_its_own_rows_in_another_order(fmt: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16()
    tensors: Fp8Tensors | Nvfp4Tensors
    if fmt == "fp8":
        tensors = Fp8Tensors(*fp8.quantize(weight))
    else:
        scale = nvfp4_blocks.global_scale(weight.abs().amax().float())
        tensors = Nvfp4Tensors(*nvfp4_blocks.quantize(weight, scale), scale.reshape(1))
    check_is_of(tensors, weight, "a layer")
    check_is_of(tensors, torch.zeros_like(weight) + weight, "a layer")
    for other in (torch.randn(64, 96).bfloat16(), weight.roll(1, 0), weight[:32].repeat(2, 1)):
        with pytest.raises(
            CheckpointError, match="a layer differs from the loaded weight"
        ) as caught:
            check_is_of(tensors, other, "a layer")
        assert "\n" not in str(caught.value)
