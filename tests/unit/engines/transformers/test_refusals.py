"""What the Transformers engine refuses, and what it says: by what a model holds, not by its labels."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import build, tokens
from torch import Tensor, nn

import mixquant
from mixquant import PrepareError
from mixquant.engines.transformers.module import PhaseLinear

INT8 = {"format": "int8", "preset": "fast", "min_prefill_tokens": 0}


def refused(model: Any, recipe: Any = None) -> str:
    with pytest.raises(PrepareError) as caught:
        mixquant.prepare(model, INT8 if recipe is None else recipe)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(isinstance(module, PhaseLinear) for module in model.modules())
    return message


def warned(caplog: Any, model: Any, **recipe: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mixquant"):
        mixquant.prepare(model, {**INT8, **recipe})
    return [record.getMessage() for record in caplog.records]


def formats(model: Any) -> dict[str, str]:
    return {layer.name: layer.format for layer in mixquant.summary(model).layers}


def causal(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


# --- quantized already -----------------------------------------------------------------------------


def torchao_int8(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_one_layer(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    only = "model.layers.1.mlp.up_proj"
    config = quantization.Float8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda module, name: name == only)
    return model


def fp8_storage(model: Any) -> Any:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    return model


def dynamic(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)


class Packed(nn.Module):
    """As bitsandbytes', HQQ's, GPTQ's: the features of a linear layer, and integers in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.data.mul(100).to(torch.int32))


class Subclass(nn.Linear):
    """As quanto's QLinear: a Linear by inheritance, with integers for a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.data.mul(100).to(torch.int8), requires_grad=False)


def one_layer(kind: Any) -> Any:
    def change(model: Any) -> Any:
        mlp = model.model.layers[0].mlp
        mlp.gate_proj = kind(mlp.gate_proj)
        return model

    return change


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "layer", "what"),
    [
        (torchao_int8, "layers.0.self_attn.q_proj", "Int8Tensor"),
        (torchao_one_layer, "layers.1.mlp.up_proj", "Float8Tensor"),
        (fp8_storage, "layers.1.mlp.up_proj", "float8_e4m3fn"),
        (dynamic, "layers.0.self_attn.q_proj", "torch.ao.nn.quantized.dynamic"),
        (one_layer(Packed), "layers.0.mlp.gate_proj", "Packed"),
        (one_layer(Subclass), "layers.0.mlp.gate_proj", "int8"),
    ],
)
def test_what_is_quantized_already_is_refused(change: Any, layer: str, what: str) -> None:
    message = refused(change(build("llama")))
    assert "quantized already" in message
    assert layer in message
    assert what in message


@pytest.mark.parametrize("method", ["gguf", "fp8", "compressed-tensors"])
def test_a_label_alone_is_no_reason_to_refuse(method: str) -> None:
    """What was dequantized as it was loaded keeps its quantizer, and plain weights."""
    model = build("llama")
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    model.is_quantized = True
    mixquant.prepare(model, INT8)
    assert formats(model)["model.layers.0.mlp.up_proj"] == "int8"


def test_weights_of_every_plain_type_are_taken() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert "int8" in formats(mixquant.prepare(build("llama").to(dtype), INT8)).values()


# --- layers that cannot be taken -----------------------------------------------------------------


def test_a_model_without_torchs_linear_layers_is_refused() -> None:
    gpt2 = causal(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    assert "GPT2LMHeadModel holds no torch.nn.Linear" in refused(gpt2)
    mixquant.prepare(gpt2, "exact")


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_another_kind_of_linear_layer_stays_and_is_told() -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    mixquant.prepare(model, INT8)
    told = {layer.name: layer for layer in mixquant.summary(model).layers}
    layer = told["model.layers.0.mlp.up_proj"]
    assert (layer.format, layer.why_precise) == ("bf16", "a Doubled, not torch.nn.Linear")
    assert told["model.layers.1.mlp.up_proj"].format == "int8"


def test_a_layer_whose_forward_was_replaced_stays_and_is_told() -> None:
    model = build("llama")
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    before = linear(torch.ones(3, 64, dtype=torch.bfloat16))
    mixquant.prepare(model, INT8)
    told = {layer.name: layer for layer in mixquant.summary(model).layers}
    assert told["model.layers.0.mlp.up_proj"].format == "bf16"
    assert "forward" in (told["model.layers.0.mlp.up_proj"].why_precise or "")
    assert torch.equal(linear(torch.ones(3, 64, dtype=torch.bfloat16)), before)


def test_the_output_head_has_the_format_of_lm_head_whatever_it_is_called() -> None:
    model = build("llama", tie_word_embeddings=False)
    model.embed_out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.embed_out
    own = {"format": {"default": "bf16", "lm_head": "int8"}, "ignore": [], "emulate": True}
    mixquant.prepare(model, own)
    assert formats(model)["embed_out"] == "int8"


def test_the_output_head_is_the_lm_head_whatever_it_is_called() -> None:
    model = build("llama", tie_word_embeddings=False)
    model.embed_out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.embed_out
    mixquant.prepare(model, INT8)
    assert formats(model)["embed_out"] == "bf16"


# --- fused projections -----------------------------------------------------------------------------

_SMALL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
INTERLEAVED = {
    "Bloom": lambda: transformers.BloomConfig(**_SMALL, hidden_size=64, n_layer=1, n_head=4),
    "CodeGen": lambda: transformers.CodeGenConfig(
        **_SMALL, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=128, n_ctx=128
    ),
    "MiniMax": lambda: transformers.MiniMaxConfig(
        **_SMALL,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=2,
        layer_types=["linear_attention"],
        block_size=32,
    ),
}


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_projections_are_not_taken_for_parts(name: str) -> None:
    """Where they lie is not known: the whole layer is as precise as its most precise one."""
    model = causal(INTERLEAVED[name]())
    ids = tokens(40) % 61 + 3
    expected = model(ids).logits
    mixed = {"default": "bf16", "q_proj": "int8", "k_proj": "bf16", "v_proj": "bf16"}
    mixquant.prepare(model, {**INT8, "format": mixed})
    fused = {"Bloom": "query_key_value"}.get(name, "qkv_proj")
    found = [(n.partition(fused)[2], f) for n, f in formats(model).items() if fused in n]
    assert found == [("", "bf16")]
    with mixquant.phase("prefill"):
        assert torch.equal(model(ids).logits, expected)


# --- settings without effect ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"ignore": ["kproj"]}, "'ignore': 'kproj' matches no linear layer"),
        ({"ignore": ["lm_haed", "lm_head"]}, "'ignore': 'lm_haed' matches no linear layer"),
        ({"format": {"default": "int8", "kproj": "bf16"}}, "'format': 'kproj' matches no"),
        ({"format": {"default": "int8", "lm_head": "fp8"}}, "'format': 'lm_head' changes nothing"),
        (
            {"format": {"default": "int8", "k*": "fp8", "k_proj": "bf16"}},
            "'format': 'k_proj' changes nothing",
        ),
        ({"preset": "exact", "format": "fp8"}, "'format' changes nothing: preset exact"),
        ({"preset": "exact", "format": "auto", "everywhere": True}, "'everywhere' changes nothing"),
        ({"block_scale": "4/6"}, "'block_scale' changes nothing"),
        ({"prefill_attention": "fp8"}, "'prefill_attention': fp8 is for vLLM"),
        ({"ignore": ["*"]}, "no layer of this model is quantized"),
    ],
)
def test_a_setting_without_effect_is_named(caplog: Any, recipe: dict[str, Any], says: str) -> None:
    (message,) = warned(caplog, build("llama", tie_word_embeddings=False), **recipe)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", {}),
        ("llama", {"ignore": []}),
        ("llama", {"preset": "exact", "format": "auto"}),
        ("llama", {"ignore": ["*.layers.0.*", "lm_head"]}),
        ("llama", {"format": "nvfp4", "preset": "balanced", "block_scale": "4/6"}),
        ("phi3", {"format": {"default": "int8", "k_proj": "fp8", "up_proj": "bf16"}}),
        ("qwen3_moe", {"ignore": ["gate", "lm_head"]}),
        ("qwen3_moe", {"format": {"default": "int8", "gate": "bf16", "experts": "bf16"}}),
    ],
)
def test_settings_with_an_effect_are_not_named(
    caplog: Any, name: str, recipe: dict[str, Any]
) -> None:
    assert warned(caplog, build(name), **recipe) == []


def test_a_format_for_what_stays_bf16_is_named(caplog: Any) -> None:
    (message,) = warned(caplog, build("qwen3_moe"), format={"default": "int8", "gate": "fp8"})
    assert "'format': 'gate' changes nothing: such layers stay BF16" in message
