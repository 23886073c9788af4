"""Writing quantized checkpoints through llm-compressor; what they hold, bit by bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import unseen_texts
from real_model import first_layers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mixquant import MixQuantConfig, cli, prepare
from mixquant.checkpoints import llm_compressor, models
from mixquant.checkpoints import write as module
from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.prefill import PrefillCheckpoint
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.write import quantize
from mixquant.evaluate.fidelity.passages import documentation
from mixquant.formats import e2m1, fp8, nvfp4_blocks


@pytest.fixture(scope="module")
def compressor() -> None:
    pytest.importorskip("llmcompressor")


def _save(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random model whose tokens are bytes."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    tiny_models.build(architecture, **changes).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["nvfp4", "fp8"])
def written(
    request: pytest.FixtureRequest,
    compressor: None,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The random Llama, quantized."""
    out = tmp_path_factory.mktemp("written") / request.param
    assert quantize(str(tiny), out, request.param, samples=2) == out
    return out


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, in which nothing must be left."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    yield directory
    assert list(directory.iterdir()) == []


def _weights(directory: Path | str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in Path(directory).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


class TestResult:
    def test_fits(self, written: Path, tiny: Path) -> None:
        checkpoint = PrefillCheckpoint.open(written)
        assert set(checkpoint.formats.values()) == {written.name}
        assert len(checkpoint.formats) == 14
        assert "lm_head" not in checkpoint.formats
        checkpoint.check_against(models.find(str(tiny)).config, tiny)

    def test_files(self, written: Path, tiny: Path) -> None:
        assert [entry.name for entry in written.parent.iterdir()] == [written.name]
        umask = module._umask()
        assert written.stat().st_mode & 0o777 == 0o777 & ~umask
        for file in written.iterdir():
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask
        text = "for x in y:"
        expected = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
        assert AutoTokenizer.from_pretrained(written)(text)["input_ids"] == expected

    def test_bits(self, written: Path, tiny: Path) -> None:
        _compare_bits(PrefillCheckpoint.open(written), _weights(tiny))

    def test_what_engines_need_to_serve_it(self, written: Path) -> None:
        config = json.loads((written / "config.json").read_text())["quantization_config"]
        (group,) = config["config_groups"].values()
        if written.name == "fp8":
            assert config["format"] == "float-quantized"
            assert group["input_activations"]["strategy"] == "token"
            return
        assert config["format"] == "nvfp4-pack-quantized"
        weights = _weights(written)
        for layer in PrefillCheckpoint.open(written).formats:
            scale = weights[f"{layer}.input_global_scale"]
            assert scale.shape == (1,)
            assert 0 < scale.item() < float("inf")
        # vLLM takes one global scale for what it fuses.
        attention = "model.layers.1.self_attn."
        (_,) = {weights[f"{attention}{x}_proj.weight_global_scale"].item() for x in "qkv"}

    def test_transformers_reads_the_same(self, written: Path) -> None:
        """By compressed-tensors' own code, which knows nothing of ours."""
        checkpoint = PrefillCheckpoint.open(written)
        loaded = AutoModelForCausalLM.from_pretrained(written, dtype="bfloat16")
        loaded(torch.tensor([[5, 6, 7]]))  # decompresses, if loading did not
        for layer in checkpoint.formats:
            weight = loaded.get_submodule(layer).weight.float()
            expected = checkpoint.layer(layer).dequantize()
            # It multiplies codes and scales in BF16.
            torch.testing.assert_close(weight, expected, rtol=2**-7, atol=1e-6)


def _compare_bits(checkpoint: PrefillCheckpoint, weights: dict[str, Tensor]) -> None:
    for name in checkpoint.formats:
        layer, weight = checkpoint.layer(name), weights[f"{name}.weight"]
        if isinstance(layer, Nvfp4Tensors):
            _compare_nvfp4(layer, weight)
        else:
            _compare_fp8(layer, weight)


def _compare_nvfp4(layer: Nvfp4Tensors, weight: Tensor) -> None:
    """llm-compressor's numbers, all bits explained, and how far ours lie from them.

    Given the global scale they differ in two ways. It divides the largest magnitudes of blocks by 6
    in BF16, which ours do in FP32: some block scales are neighbours in E4M3 (1.5 % in SmolLM2). And
    it divides by the scale where ours multiply with its reciprocal, as vLLM does: some codes that
    lie on a tie (2 in 100,000; in one layer 1 in 1,000).
    """
    blocks = weight.view(weight.shape[0], -1, nvfp4_blocks.BLOCK)  # [N, K/16, 16]
    in_bf16 = blocks.abs().amax(dim=-1) / e2m1.MAX
    scales = (in_bf16 * layer.global_scale).clamp(max=nvfp4_blocks.E4M3_MAX).to(torch.float8_e4m3fn)
    assert torch.equal(layer.block_scales.view(torch.uint8), scales.view(torch.uint8))
    factor = layer.block_scales.float() / layer.global_scale
    codes = e2m1.encode(blocks.float() / factor.unsqueeze(-1))
    assert torch.equal(e2m1.unpack(layer.codes).view_as(codes), codes)

    our_codes, our_scales = nvfp4_blocks.quantize(weight, layer.global_scale)
    steps = (our_scales.view(torch.uint8).int() - scales.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.05
    differ = e2m1.unpack(our_codes).view_as(codes) != codes
    assert differ[steps == 0].float().mean() < 5e-3
    assert (e2m1.unpack(our_codes).view_as(codes).int() - codes.int()).abs().max() <= 1


def _compare_fp8(layer: Fp8Tensors, weight: Tensor) -> None:
    """The scales are ours, rounded to BF16; the codes are those that follow from them."""
    scale = weight.abs().amax(dim=1, keepdim=True) / fp8.E4M3_MAX  # in BF16
    assert torch.equal(layer.scale, scale.float())
    values = (weight / scale).clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX)
    assert torch.equal(
        layer.codes.view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8)
    )
    _, our_scale = fp8.quantize(weight)
    torch.testing.assert_close(layer.scale, our_scale, rtol=2**-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_smollm2(compressor: None, smollm2_path: str, tmp_path: Path, scheme: Any) -> None:
    """Real weights, of a few layers."""
    (tmp_path / "source").mkdir()
    source = first_layers(smollm2_path, tmp_path / "source", 3)
    told: list[tuple[str, float]] = []
    out = quantize(
        source,
        tmp_path / "out",
        scheme,
        samples=1,
        progress=lambda doing, share: told.append((doing, share)),
    )
    checkpoint = PrefillCheckpoint.open(out)
    assert len(checkpoint.formats) == 3 * 7
    _compare_bits(checkpoint, _weights(source))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_mixture_of_experts(compressor: None, tmp_path: Path) -> None:
    source = _save(tmp_path / "source", "qwen3_moe")
    checkpoint = PrefillCheckpoint.open(quantize(str(source), tmp_path / "out", samples=1))
    assert "model.layers.1.mlp.experts.3.down_proj" in checkpoint.formats
    assert not any(name.partition("layers.0.")[2] == "mlp.gate" for name in checkpoint.formats)
    _compare_bits(checkpoint, _weights(source))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_gptq_keeps_products_closer(
    compressor: None, smollm2_path: str, tmp_path: Path, scheme: Any
) -> None:
    """Real weights of one layer, on texts that it was not calibrated on."""
    (tmp_path / "source").mkdir()
    source = first_layers(smollm2_path, tmp_path / "source", 1)
    text = "\n".join(Path(file).read_text() for file in (os.__file__, shutil.__file__))
    told: list[tuple[str, float]] = []
    found = {}
    for rounding in ("nearest", "gptq"):
        out = quantize(
            str(source),
            tmp_path / rounding,
            scheme,
            rounding=rounding,  # type: ignore[arg-type]
            samples=8,
            progress=lambda doing, share: told.append((doing, share)),
            text=text if rounding == "gptq" else None,
        )
        checkpoint = PrefillCheckpoint.open(out)
        assert set(checkpoint.formats.values()) == {scheme}
        found[rounding] = {name: checkpoint.layer(name).dequantize() for name in checkpoint.formats}
    assert any(doing == "Rounding, 1 of 2 layers" for doing, _ in told), told

    model, tokenizer = models.load(str(source))
    ids = tokenizer("\n\n".join(topics.values())[:20_000], return_tensors="pt")["input_ids"]
    errors: dict[str, tuple[float, float]] = {}

    def compare(name: str, x: Tensor, weight: Tensor) -> None:
        wanted = x @ weight.T
        errors[name] = tuple(  # type: ignore[assignment]
            float((x @ found[rounding][name].T - wanted).norm()) for rounding in ("nearest", "gptq")
        )

    for name in found["nearest"]:
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, out, name=name: compare(name, args[0].float(), layer.weight.float())
        )
    with torch.no_grad():
        model(ids[:, :2048])
    assert len(errors) == 7
    ratios = {name: gptq / nearest for name, (nearest, gptq) in errors.items()}
    assert max(ratios.values()) < 1, ratios
    assert sum(ratios.values()) < 0.75 * len(ratios), ratios


def test_gptq_is_not_fitted_to_texts_that_measure_it() -> None:
    fitted = module._library()
    measured = [*documentation(len(topics)).values(), *unseen_texts.texts().values()]
    assert len(measured) > 10
    for text in measured:
        assert text[:2000] not in fitted


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_5"])
def test_gptq_on_other_architectures(compressor: None, tmp_path: Path, architecture: str) -> None:
    source = _save(tmp_path / "source", architecture)
    quantize(str(source), tmp_path / "out", rounding="gptq", samples=2)


def test_small_layers_stay(compressor: None, tmp_path: Path) -> None:
    """Linear attention has projections of four rows, which no kernel takes."""
    source = _save(tmp_path / "source", "qwen3_5")
    formats = PrefillCheckpoint.open(quantize(str(source), tmp_path / "out", samples=1)).formats
    assert "model.layers.0.linear_attn.in_proj_qkv" in formats
    assert "model.layers.0.linear_attn.in_proj_a" not in formats


def test_ignore(compressor: None, tiny: Path, tmp_path: Path) -> None:
    patterns = ("o_proj", "model.layers.1.mlp.*")
    checkpoint = PrefillCheckpoint.open(quantize(str(tiny), tmp_path / "o", "fp8", ignore=patterns))
    left = {name for name in _weights(tiny) if "proj" in name} - {
        f"{name}.weight" for name in checkpoint.formats
    }
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert left == mlp | {f"model.layers.{index}.self_attn.o_proj.weight" for index in (0, 1)}


def test_empty_directory_is_filled(compressor: None, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    PrefillCheckpoint.open(quantize(str(tiny), tmp_path / "out", "fp8"))


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_model_with_a_recipe(compressor: None, tiny: Path, tmp_path: Path, scheme: Any) -> None:
    """What mixquant saved is a BF16 checkpoint, though its config.json says quantization_config."""
    model, tokenizer = models.load(str(tiny))
    prepare(model).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == MixQuantConfig().quant_method
    out = quantize(str(tmp_path / "source"), tmp_path / "out", scheme, samples=1)
    _compare_bits(PrefillCheckpoint.open(out), _weights(tiny))


class TestRefusals:
    """Bad input is one line, and leaves nothing."""

    def _refused(self, *arguments: Any, **options: Any) -> str:
        with pytest.raises(ModelError) as caught:
            quantize(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_out_is_not_empty(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("x")
        assert "is not empty" in self._refused(str(tiny), tmp_path)
        assert (tmp_path / "precious").read_text() == "x"

    def test_out_is_the_model(self, tiny: Path) -> None:
        assert "is not empty" in self._refused(str(tiny), tiny)

    def test_out_is_a_file(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        assert "is not a directory" in self._refused(str(tiny), tmp_path / "out")

    def test_no_directory_for_it(self, tiny: Path, work: Path) -> None:
        assert "there is no directory" in self._refused(str(tiny), "no/out")

    def test_not_writable(self, tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert "is not writable" in self._refused(str(tiny), "out")

    def test_not_installed(self, tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'mixquant[quantize]'" in self._refused(str(tiny), "out")

    def test_scheme(self, tiny: Path, work: Path) -> None:
        assert "unknown format 'int8'" in self._refused(str(tiny), "out", "int8")

    def test_rounding(self, tiny: Path, work: Path) -> None:
        assert "unknown rounding 'awq'" in self._refused(str(tiny), "out", rounding="awq")

    def test_text(self, tiny: Path, work: Path) -> None:
        assert "is empty" in self._refused(str(tiny), "out", text=" ")
        assert "leave the text out" in self._refused(str(tiny), "out", "fp8", text="Some.")

    def test_samples(self, tiny: Path, work: Path) -> None:
        assert "at least one sample" in self._refused(str(tiny), "out", samples=0)

    def test_no_model(self, compressor: None, work: Path) -> None:
        assert "is not a model" in self._refused("/no/such/model", "out")

    def test_quantized_already(self, written: Path, work: Path) -> None:
        said = self._refused(str(written), "out")
        assert "quantized already (compressed-tensors)" in said

    def test_nothing_to_ignore(self, compressor: None, tiny: Path, work: Path) -> None:
        assert "'k_porj' to ignore" in self._refused(str(tiny), "out", ignore=["o_proj", "k_porj"])

    def test_nothing_left(self, compressor: None, tiny: Path, work: Path) -> None:
        assert "no linear layer is left" in self._refused(str(tiny), "out", ignore=["*"])

    def test_no_tokenizer(self, compressor: None, tmp_path: Path, work: Path) -> None:
        tiny_models.build("llama").save_pretrained(tmp_path / "source")
        assert "cannot load the tokenizer" in self._refused(str(tmp_path / "source"), "out")

    def test_damaged_weight(self, compressor: None, tmp_path: Path, work: Path) -> None:
        source = _save(tmp_path / "source")
        model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
        model.save_pretrained(source)
        said = self._refused(str(source), "out")
        assert "model.layers.0.mlp.up_proj holds NaN" in said

    def test_no_space_before(
        self, compressor: None, tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**4))
        assert "no disk space to write out" in self._refused(str(tiny), "out")

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "no disk space left"),
            (RuntimeError("No space left on device (os error 28)"), "no disk space left"),
            (ValueError("something\nlong"), "ValueError: something"),
        ],
    )
    @pytest.mark.parametrize("where", ["calibration", "saving"])
    def test_failure_half_way(
        self,
        compressor: None,
        tiny: Path,
        work: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        says: str,
        where: str,
    ) -> None:
        real = llm_compressor.run

        def run(*arguments: Any) -> None:
            if where == "saving":
                real(*arguments)
            (partial,) = work.iterdir()  # llm-compressor writes beside OUT
            assert partial.name.startswith(".out.")
            raise error

        monkeypatch.setattr(llm_compressor, "run", run)
        said = self._refused(str(tiny), "out", "fp8")
        assert said.startswith("cannot quantize")
        assert says in said

    def test_result_that_does_not_fit(
        self, compressor: None, tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = module._left_alone

        def left_alone(model: Any, *rest: Any) -> list[str]:
            model.model.norm.weight.data[3] += 1
            return real(model, *rest)

        monkeypatch.setattr(module, "_left_alone", left_alone)
        assert "model.norm.weight differs" in self._refused(str(tiny), "out", "fp8")

    def test_interrupted(
        self, compressor: None, tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(*arguments: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(llm_compressor, "run", run)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(tiny), "out")


class TestCommand:
    @pytest.mark.parametrize("rounding", ["nearest", "gptq"])
    def test_writes(
        self,
        compressor: None,
        tiny: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        rounding: str,
    ) -> None:
        out = tmp_path / "out"
        arguments = ["quantize", str(tiny), str(out), "--ignore", "o_proj", "--samples", "1"]
        arguments += ["--rounding", rounding]
        assert cli.main(arguments) == 0
        assert len(PrefillCheckpoint.open(out).formats) == 12
        printed = capfd.readouterr()
        assert printed.out == ""
        # No log lines; on a busy machine, lines of progress.
        lines = [line for line in printed.err.splitlines() if not line.endswith(" s so far")]
        assert len(lines) == 1 and lines[0].startswith(f"wrote {out}")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["quantize"], "MODEL"),
            (["quantize", "smollm2"], "OUT"),
            (["quantize", "smollm2", "out", "--format", "int4"], "unknown format 'int4'"),
            (["quantize", "smollm2", "out", "--samples", "0"], "--samples"),
            (["quantize", "smollm2", "out", "--rounding", "awq"], "unknown rounding 'awq'"),
            (["quantize", "smollm2", "out", "--text", "no.txt"], "cannot read no.txt"),
            (["quantize", "smollm2", "no/out"], "there is no directory"),
            (["quantize", "smollm2", "/"], "is not empty"),
        ],
    )
    def test_bad_input(
        self, work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
    ) -> None:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert says in printed.err


def test_without_a_compiler(
    compressor: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(*arguments: Any, **options: Any) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", compile)
    out = quantize(str(tiny), tmp_path / "out", samples=1)
    _compare_bits(PrefillCheckpoint.open(out), _weights(tiny))
