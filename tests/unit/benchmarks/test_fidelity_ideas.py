"""The parts of their own that the benchmark of ideas for fidelity has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch
import torch.nn.functional as F

pytest.importorskip("torchao.prototype.mx_formats")

import fidelity_ideas as ideas
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import prepare
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.formats import EMULATION
from mixquant.formats.nvfp4 import NVFP4
from mixquant.formats.nvfp4_blocks import BlockScale
from mixquant.tune import measure


@pytest.mark.parametrize("block_scale", ["6", "4/6"])
def test_gptq_errs_less_than_rounding_on_correlated_inputs(block_scale: BlockScale) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 192)
    x = torch.randn(512, 192) @ torch.randn(192, 192) * torch.linspace(0.2, 4, 192)
    nearest = NVFP4.quantize_weight(weight, EMULATION, block_scale)
    scales = nearest.block_scales.float() * nearest.tensor_scale
    codes = ideas.gptq(weight, scales, x.T @ x)
    assert codes.shape == weight.shape
    values = ideas.e2m1.decode(codes) * scales.repeat_interleave(16, dim=1)
    wanted = x @ weight.T
    errors = [(x @ w.T - wanted).norm() for w in (values, NVFP4.dequantize_weight(nearest))]
    assert errors[0] < 0.7 * errors[1]


def test_gptq_rounds_to_nearest_where_inputs_are_independent() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 160)
    weight[:, 32:48] = 0  # blocks with scales of zero
    nearest = NVFP4.quantize_weight(weight, EMULATION)
    scales = nearest.block_scales.float() * nearest.tensor_scale
    codes = ideas.gptq(weight, scales, torch.rand(160).diag())
    values = ideas.e2m1.decode(codes) * scales.repeat_interleave(16, dim=1)
    torch.testing.assert_close(values, NVFP4.dequantize_weight(nearest))


def test_mxfp8_multiplies_as_torchao_does() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(16, 128, dtype=torch.bfloat16)
    weight = ideas.MXFP8.quantize_weight(layer.weight, EMULATION)
    out = torch.empty(16, 64, dtype=torch.bfloat16)
    ideas.MXFP8.linear(ideas.MXFP8.quantize_rows(x, EMULATION), weight, None, out)
    quantize_(
        layer,
        MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            kernel_preference=KernelPreference.EMULATED,
        ),
    )
    with torch.no_grad():
        torch.testing.assert_close(out, layer(x))
        assert not torch.equal(out, F.linear(x, layer.weight.dequantize()))


RECIPE = Recipe(
    format={"default": "nvfp4"},
    precise_head=ideas.HEAD,
    precise_tail=0,
    min_prefill_tokens=0,
    emulate=True,
    prefill_attention="bf16",
)


@pytest.fixture
def text() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(3, tiny_models.VOCABULARY, (160,))


def test_prompts_read_at_once_are_those_read_alone(text: torch.Tensor) -> None:
    model = prepare(tiny_models.build("llama"), RECIPE)
    found = ideas.read(model, text, [(64, 8), (96, 1), (96, 24)])
    assert not torch.allclose(found[96, 1], found[96, 24], rtol=0.01, atol=0.01)
    for (length, tail), logits in found.items():
        model.mixquant_thresholds = replace(model.mixquant_thresholds, precise_tail=tail)
        prompt, continuation = text[:length], text[length : length + ideas.ANSWER]
        passages = Passages(length, (tuple(prompt.tolist()),), (tuple(continuation.tolist()),))
        (wanted,) = measure.logits(model, passages)
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_mean_errors_are_gone_where_they_were_found(text: torch.Tensor) -> None:
    model = prepare(tiny_models.build("llama"), RECIPE)
    found = ideas.calibrated(model, [text])
    with ideas.mean_errors_taken_off(model, found):
        left = ideas.calibrated(model, [text])
    first = "model.layers.0.self_attn.k_proj"
    # What is left is BF16's rounding.
    assert left.errors[first].norm() < 0.1 * found.errors[first].norm()
