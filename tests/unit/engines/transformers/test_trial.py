"""Layers whose rows are not those of the pass: found by a tiny pass as a model is prepared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import build, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mixquant
from mixquant import PrepareError, Recipe
from mixquant.engines.transformers import everything_in_prefill_format, trial
from mixquant.engines.transformers.module import PhaseLinear

FAST = Recipe(preset="fast", format="int8", min_prefill_tokens=0)


def cpm_ant() -> PreTrainedModel:
    """It puts a prompt that it has learned in front of the tokens: eight rows more than the pass has."""
    torch.manual_seed(0)
    config = transformers.CpmAntConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=4,
        dim_head=16,
        dim_ff=96,
        num_hidden_layers=2,
        prompt_length=8,
        prompt_types=8,
        segment_types=8,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def test_a_model_whose_rows_are_not_the_passs_is_refused() -> None:
    model = cpm_ant()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(PrepareError, match="CpmAntForCausalLM are not given one row") as caught:
        mixquant.prepare(model, FAST)
    assert "\n" not in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    mixquant.prepare(model, "exact")  # which quantizes nothing


class Sideways(nn.Module):
    """An MLP with its own ideas: one layer takes sequences across, one is used without being called."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x.transpose(0, 1)).transpose(0, 1)
        gate = nn.functional.linear(x, self.gate_proj.weight)
        result: Tensor = self.down_proj(input=up * gate.sigmoid())
        return result


def test_single_layers_stay_bf16_and_are_told() -> None:
    model = build("llama")
    model.model.layers[1].mlp = Sideways(model.model.layers[1].mlp)
    mixquant.prepare(model, FAST)
    layers = {layer.name: layer for layer in mixquant.summary(model).layers}
    mlp = "model.layers.1.mlp"
    assert layers[f"{mlp}.up_proj"].why_precise == "its rows are not the pass's"
    assert layers[f"{mlp}.gate_proj"].why_precise == "no pass goes through it"
    assert layers[f"{mlp}.down_proj"].format == "int8"
    assert layers["model.layers.0.mlp.up_proj"].format == "int8"
    assert not isinstance(model.model.layers[1].mlp.up_proj, PhaseLinear)


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma4_moe"])
def test_the_summary_tells_which_layers_quantize(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixquant.prepare(build(name), FAST)
    quantizing: set[str] = set()
    parts = PhaseLinear.parts.fget  # type: ignore[attr-defined]

    def noted(layer: PhaseLinear) -> Any:
        quantizing.add(layer.name)
        return parts(layer)

    told = {layer.name for layer in mixquant.summary(model).layers if layer.format == "int8"}
    monkeypatch.setattr(PhaseLinear, "parts", property(noted))
    with torch.no_grad(), mixquant.phase("prefill"):
        model(tokens(40))
    assert quantizing == told


def test_the_tiny_pass_leaves_nothing_behind() -> None:
    model = build("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = trial.why_not_its_rows(
        model, [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    )
    assert found == {}
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_be_tried_is_prepared_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    original = type(model).forward

    def picky(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] < 8:
            raise ValueError("too short")
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", picky)
    mixquant.prepare(model, FAST)
    assert sum(layer.format == "int8" for layer in mixquant.summary(model).layers) == 14
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- gradients ------------------------------------------------------------------------------------


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    loss: Tensor = model(ids, labels=ids).loss
    return loss


def test_a_quantized_prefill_has_no_gradients() -> None:
    model = mixquant.prepare(build("llama"), FAST)
    with mixquant.phase("prefill"):
        loss = loss_of(model, tokens(40))
    with pytest.raises(RuntimeError, match="a quantized prefill has no gradients") as caught:
        loss.backward()
    assert "\n" not in str(caught.value)
    with everything_in_prefill_format():
        loss = loss_of(model, tokens(40))
    with pytest.raises(RuntimeError, match="a quantized prefill has no gradients"):
        loss.backward()


def test_gradients_of_what_stands_in_front_are_refused_too() -> None:
    """Prompt tuning: the weights are frozen, the first rows are to be learned."""
    model = mixquant.prepare(build("llama"), FAST).requires_grad_(False)
    rows = model.get_input_embeddings()(tokens(40)).requires_grad_()
    with mixquant.phase("prefill"):
        logits = model(inputs_embeds=rows).logits
    with pytest.raises(RuntimeError, match="a quantized prefill has no gradients"):
        logits.float().sum().backward()


def test_precise_passes_have_the_gradients_of_the_plain_model() -> None:
    plain, model = build("llama"), mixquant.prepare(build("llama"), FAST)
    loss_of(plain, tokens(40)).backward()
    with mixquant.phase("decode"):
        loss_of(model, tokens(40)).backward()
    for (name, wanted), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert wanted.grad is not None, name
        assert torch.equal(ours.grad, wanted.grad), name


def test_checkpointing_cannot_compute_another_pass_for_the_gradients() -> None:
    model = mixquant.prepare(build("llama"), FAST)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        mixquant.phase("prefill"),
        pytest.raises(PrepareError, match="gradient checkpointing"),
    ):
        model(tokens(40))
    with torch.no_grad(), mixquant.phase("prefill"):
        model(tokens(40))


def test_fused_norms_refuse_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where INT8 is native they are computed without gradients; here they are called by hand."""
    from mixquant.core.phase import everything_quantized, in_force
    from mixquant.engines.transformers import fusion

    model = build("llama")
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(1, 20, 64, dtype=torch.bfloat16)
    with in_force(everything_quantized(20)):
        y = fusion._phase_norm(norm, norm, x)
        assert torch.allclose(y, norm(x), rtol=0.02, atol=0.02)
        with pytest.raises(RuntimeError, match="a quantized prefill has no gradients"):
            y.float().sum().backward()
        norm.requires_grad_(False)
        assert not fusion._phase_norm(norm, norm, x).requires_grad
