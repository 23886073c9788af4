"""Finding and loading models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mixquant.checkpoints import models
from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.models import find


class TestFind:
    @pytest.mark.parametrize("name", ["", "/no/such/directory", "./nothing", "a/b/c", "~nobody/x"])
    def test_no_such_directory(self, name: str) -> None:
        with pytest.raises(ModelError, match="is not a model"):
            find(name)

    def test_hub_name_that_cannot_be_fetched(self) -> None:
        with pytest.raises(
            ModelError, match="cannot be downloaded from the Hugging Face Hub"
        ) as caught:
            find("nobody/has-this-one")
        assert "\n" not in str(caught.value)

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"")
        with pytest.raises(ModelError, match="a file"):
            find(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (None, "holds no config.json"),
            ("{", "its config.json"),
            ("[]", "names no model_type"),
            ("{}", "names no model_type"),
            ('{"model_type": []}', "names no model_type"),
            ('{"model_type": ["llama"]}', "names no model_type"),
            ('{"a":' * 100_000, "nested deeper than 100 levels"),
            ('{"model_type": %s}' % ("9" * 5_000), "more than 4,300 digits"),
            (
                '{"model_type": "x", "text_config": {"quantization_config": {"quant_method": "awq"}}}',
                r"quantized already \(awq\)",
            ),
            (
                '{"model_type": "x", "quantization_config": {"quant_method": "mixquant"},'
                ' "text_config": {"quantization_config": {"quant_method": "awq"}}}',
                r"quantized already \(awq\)",
            ),
            ('{"model_type": "x", "quantization_config": "fp8"}', "quantized already"),
            (b"\xff\xfe", "its config.json"),
            (
                '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
                r"quantized already \(gptq\)",
            ),
            (
                '{"model_type": "llama", "compression_config": {"format": "pack"}}',
                "quantized already",
            ),
        ],
    )
    def test_directory_that_is_no_model(
        self, tmp_path: Path, config: str | bytes | None, says: str
    ) -> None:
        if config is not None:
            raw = config if isinstance(config, bytes) else config.encode()
            (tmp_path / "config.json").write_bytes(raw)
        with pytest.raises(ModelError, match=says) as caught:
            find(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_config(self, tmp_path: Path) -> None:
        quantization = {"quant_method": "mixquant", "recipe": {"format": "int8"}}
        config = {
            "model_type": "x",
            "text_config": {"max_position_embeddings": 64},
            "quantization_config": quantization,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = find(str(tmp_path))
        assert found.context == 64
        assert found.recipe == {"format": "int8"}
        assert found.source == str(tmp_path)

    @pytest.mark.parametrize("tokens", [True, -5, 0, "many", 2.5, None, [4]])
    def test_a_context_that_is_no_number_of_tokens(self, tmp_path: Path, tokens: object) -> None:
        config = {"model_type": "x", "max_position_embeddings": tokens}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find(str(tmp_path)).context is None

    def test_infinity_as_mamba_has_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "x", "limit": [0.0, Infinity]}')
        assert find(str(tmp_path)).config["limit"] == [0.0, float("inf")]


class TestLoad:
    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        return tmp_path

    def test_types(self, tiny: Path) -> None:
        for dtype in ("bfloat16", "float32"):
            model = models.load_model(find(str(tiny)), dtype, device="cpu")
            assert str(model.dtype) == f"torch.{dtype}"
            assert not model.training

    def test_what_mixquant_saved_is_loaded_plain(self, tiny: Path) -> None:
        config = json.loads((tiny / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mixquant", "recipe": {"format": "int8"}}
        (tiny / "config.json").write_text(json.dumps(config))
        model = models.load_model(find(str(tiny)), device="cpu")
        assert not hasattr(model, "mixquant_summary")

    def test_fp8_storage_that_no_configuration_tells_of(self, tiny: Path) -> None:
        """Loaded as BF16, its codes would be taken for weights."""
        tensors = load_file(tiny / "model.safetensors")
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        scale = tensors[name].float().abs().amax() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)
        save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"quantized already.*{name}_scale"):
            models.load_model(find(str(tiny)))

    def test_missing_weight(self, tiny: Path) -> None:
        # Transformers fills it with random numbers and goes on.
        file = tiny / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.0.self_attn.k_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"k_proj\.weight"):
            models.load_model(find(str(tiny)), device="cpu")

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_damaged_weights(self, tiny: Path, damage: str) -> None:
        file = tiny / "model.safetensors"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            file.unlink()
        with pytest.raises(ModelError, match="cannot load the model") as caught:
            models.load_model(find(str(tiny)), device="cpu")
        assert "\n" not in str(caught.value)

    def test_no_tokenizer(self, tiny: Path) -> None:
        with pytest.raises(ModelError, match="cannot load the tokenizer"):
            models.load_tokenizer(find(str(tiny)))
