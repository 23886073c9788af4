"""A recipe's prefill_model in the Transformers engine: whose weights the copies are, and refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import second_checkpoints
import torch
from tiny_models import build, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mixquant
from mixquant import MixQuantConfig, RecipeError
from mixquant.checkpoints.compressed_tensors import CompressedTensors
from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import Nvfp4Tensors
from mixquant.engines.transformers.module import PhaseLinear, phase_linears
from mixquant.formats import BY_NAME, fp8, nvfp4_blocks

PROMPT = tokens(40)

pytestmark = pytest.mark.usefixtures("inference")

Second = Callable[..., str]


@pytest.fixture(scope="module", params=["llama", "phi3"])
def main(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in BF16; Phi-3 fuses q, k and v, and gate and up."""
    directory = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(directory)
    return directory


@pytest.fixture
def second(main: Path, tmp_path: Path) -> Second:
    return lambda *args, **kwargs: str(
        second_checkpoints.write(main, tmp_path / "second", *args, **kwargs)
    )


def load(directory: Path, dtype: Any = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def prepared(main: Path, **recipe: Any) -> Any:
    return mixquant.prepare(load(main), {"min_prefill_tokens": 0, **recipe})


def prefill(model: Any) -> Tensor:
    with mixquant.phase("prefill"):
        logits: Tensor = model(PROMPT).logits
    return logits


def parts_of(model: Any, name: str) -> list[tuple[str, Tensor | None]]:
    """The format of each part of a layer, and the matrix that it stands for."""
    return [
        (part.format, BY_NAME[part.format].dequantize_weight(part.weight) if part.weight else None)
        for part in model.get_submodule(name).parts
    ]


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
def test_the_same_rounding_gives_the_same_answers(main: Path, second: Second, fmt: str) -> None:
    """The checkpoint here is rounded to the nearest, as copies of the engine's own are."""
    own = prepared(main, format={"default": fmt})
    theirs = prepared(main, prefill_model=second(fmt))
    assert torch.equal(prefill(theirs), prefill(own))
    lines = [(line.name, line.format) for line in mixquant.summary(theirs).layers]
    assert lines == [(line.name, line.format) for line in mixquant.summary(own).layers]


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
def test_the_copy_is_the_checkpoints(main: Path, second: Second, fmt: str) -> None:
    source = second(fmt, factor=1.05)
    model, checkpoint = prepared(main, prefill_model=source), CompressedTensors.open(source)
    for layer in phase_linears(model):
        ((found, weight),) = parts_of(model, layer.name)
        assert found == fmt and weight is not None
        assert torch.equal(weight, checkpoint.layer(layer.name).dequantize())
    plain = load(main)
    assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)  # decode is BF16
    assert not torch.equal(prefill(model), prefill(prepared(main, format={"default": fmt})))


def test_other_formats_are_rounded_from_the_bf16_weights(main: Path, second: Second) -> None:
    source = second("nvfp4", factor=1.05)
    formats = {"k_proj": "fp8", "*.layers.1.mlp.*": "bf16", "default": "nvfp4"}
    model, checkpoint = prepared(main, format=formats, prefill_model=source), load(main)
    attention = "model.layers.0.self_attn"
    stored = CompressedTensors.open(source)
    if "qkv_proj" in dict(model.model.layers[0].self_attn.named_children()):
        q, k, v = parts_of(model, f"{attention}.qkv_proj")
        whole = stored.layer(f"{attention}.qkv_proj").dequantize()
        weight = checkpoint.get_submodule(f"{attention}.qkv_proj").weight
        sizes = [len(one[1]) for one in (q, k, v)]  # type: ignore[arg-type]
        wanted_q, _, wanted_v = whole.split(sizes)
        weight = weight.split(sizes)[1]
    else:
        q, k, v = (parts_of(model, f"{attention}.{one}_proj")[0] for one in "qkv")
        wanted_q, wanted_v = (stored.layer(f"{attention}.{o}_proj").dequantize() for o in "qv")
        weight = checkpoint.get_submodule(f"{attention}.k_proj").weight
    assert (q[0], k[0], v[0]) == ("nvfp4", "fp8", "nvfp4")
    assert torch.equal(q[1], wanted_q) and torch.equal(v[1], wanted_v)  # type: ignore[arg-type]
    assert torch.equal(k[1], fp8.dequantize(*fp8.quantize(weight)))  # type: ignore[arg-type]
    names = {line.name: line.format for line in mixquant.summary(model).layers}
    assert names["model.layers.1.mlp.down_proj"] == "bf16"


def test_the_more_precise_of_two_formats(main: Path, second: Second) -> None:
    """A checkpoint in FP8 has no weights in NVFP4 to give, and its own are better."""
    same = {"precise_head": 0}  # which depends on the recipe's formats
    model = prepared(main, format={"default": "nvfp4"}, prefill_model=second("fp8"), **same)
    own = prepared(main, format={"default": "fp8"}, **same)
    assert torch.equal(prefill(model), prefill(own))


def test_layers_that_the_checkpoint_leaves_alone_stay_bf16(main: Path, second: Second) -> None:
    name = "model.layers.1.mlp.down_proj"

    def leave(tensors: dict[str, Tensor]) -> None:
        for part in ("packed", "scale", "global_scale"):
            del tensors[f"{name}.weight_{part}"]
        del tensors[f"{name}.input_global_scale"]
        tensors[f"{name}.weight"] = load(main).get_submodule(name).weight.detach().clone()

    model = prepared(main, format={"default": "nvfp4"}, prefill_model=second(tensors=leave))
    line = next(line for line in mixquant.summary(model).layers if line.name == name)
    assert (line.format, line.why_precise) == ("bf16", "not quantized in the prefill model")


def test_block_scales_of_rows_are_the_recipes(main: Path, second: Second) -> None:
    source = second()
    six, both = (prepared(main, prefill_model=source, block_scale=how) for how in ("6", "4/6"))
    assert not torch.equal(prefill(six), prefill(both))


def test_another_models_checkpoint_is_refused(main: Path, second: Second, tmp_path: Path) -> None:
    kind = load(main).config.model_type
    build(kind, seed=1).save_pretrained(tmp_path / "other")
    model = load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit the main model") as caught:
        mixquant.prepare(model, {"prefill_model": second()})
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, PhaseLinear) for module in model.modules())


def test_weights_without_files_are_compared_as_they_are(main: Path, second: Second) -> None:
    source = second()
    model = load(main)
    model.name_or_path = ""
    same = mixquant.prepare(copy.deepcopy(model), {"prefill_model": source})
    assert len(phase_linears(same)) > 1
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.neg_()
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj differs"):
        mixquant.prepare(model, {"prefill_model": source})
    assert not phase_linears(model)


def test_a_layer_of_another_shape_is_refused(main: Path, second: Second) -> None:
    model = load(main)
    model.name_or_path = ""
    model.model.layers[1].self_attn.o_proj = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"o_proj is \[32, 64\], in .*second \[64, 64\]"):
        mixquant.prepare(model, {"prefill_model": second()})


def test_a_weight_that_changes_later_is_refused(main: Path, second: Second) -> None:
    model = prepared(main, prefill_model=second())
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.neg_()
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj differs"):
        prefill(model)


@pytest.mark.parametrize("format", ["fp8", "int8", "bf16"])
def test_a_format_that_the_checkpoint_has_not_is_refused(
    main: Path, second: Second, format: str
) -> None:
    with pytest.raises(RecipeError, match=r"formats come from .*second, in nvfp4; remove 'format'"):
        prepared(main, format=format, prefill_model=second())


def test_no_such_checkpoint(main: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        prepared(main, prefill_model="some/where/else")


def test_copies_and_saved_models_have_the_same(main: Path, second: Second, tmp_path: Path) -> None:
    source = second(factor=1.05)
    model = prepared(main, prefill_model=source)
    expected = prefill(model)
    assert torch.equal(prefill(copy.deepcopy(model)), expected)
    assert torch.equal(prefill(pickle.loads(pickle.dumps(model))), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(prefill(load(tmp_path / "saved")), expected)
    config = MixQuantConfig({"prefill_model": source, "min_prefill_tokens": 0})
    loaded = AutoModelForCausalLM.from_pretrained(
        main, dtype=torch.bfloat16, quantization_config=config
    )
    assert torch.equal(prefill(loaded), expected)


def test_a_gpus_layout(main: Path, second: Second) -> None:
    """Scales swizzled, nothing unpacked: what a native kernel is given, but for the product."""
    from mixquant.formats import Kernel
    from mixquant.formats.swizzle import swizzle

    stored = CompressedTensors.open(second()).layer("model.layers.0.mlp.down_proj")
    assert isinstance(stored, Nvfp4Tensors)
    weight = stored.weight_for(Kernel("torch.scaled_mm", native=True), torch.device("cpu"))
    assert weight.unscaled is None and weight.shape == stored.shape
    assert torch.equal(
        weight.block_scales.view(torch.uint8), swizzle(stored.block_scales).view(torch.uint8)
    )
    back = nvfp4_blocks.dequantize(stored.codes, stored.block_scales, weight.tensor_scale)
    assert torch.equal(back, stored.dequantize())
