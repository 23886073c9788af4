"""Norms and MLPs that are fused with the quantization of their results, against the plain ones."""

import pytest
import torch
from tiny_models import build, distance, tokens

import mixquant
from mixquant.core.phase import PhasePlan, in_force
from mixquant.engines.transformers import fusion
from mixquant.engines.transformers.methods import Method
from mixquant.formats.int8 import INT8, ONEDNN

RECIPE = {"format": "int8", "preset": "fast", "min_prefill_tokens": 0}

PLANS = {
    "all": PhasePlan(40, ((0, 40),), ()),
    "a tail": PhasePlan(40, ((0, 39),), ((39, 40),)),
    "two sequences and padding": PhasePlan(40, ((5, 18), (22, 39)), ((18, 20), (39, 40))),
    "few rows": PhasePlan(3, ((0, 2),), ((2, 3),)),
}

needs_onednn = pytest.mark.skipif(
    INT8.kernel(torch.device("cpu")) != ONEDNN, reason="INT8 is emulated on this processor"
)
pytestmark = needs_onednn


def fused(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if name and isinstance(vars(module).get("forward"), Method)
    ]


@pytest.fixture(scope="module")
def layer():
    model = mixquant.prepare(build("llama"), RECIPE)
    with torch.no_grad():  # a norm that scales by one everywhere would hide a forgotten weight
        for norm in (model.model.layers[0].input_layernorm,):
            norm.weight.copy_(torch.linspace(0.5, 2, norm.weight.numel()))
    return model.model.layers[0]


@pytest.mark.parametrize("name", PLANS)
def test_a_fused_norm_gives_its_output_and_the_rows_of_it(layer, name):
    plan = PhasePlan(PLANS[name].rows, PLANS[name].quantized, PLANS[name].precise)
    norm = layer.input_layernorm
    x = torch.randn(1, plan.rows, 64).bfloat16()
    expected = type(norm).forward(norm, x)
    assert torch.equal(norm(x), expected)  # no plan: the module's own code
    with in_force(plan):
        assert torch.equal(norm(hidden_states=x), expected)
    with in_force(plan):
        y = norm(x)
    assert distance(expected, y) < 2**-8
    ((of, _, rows),) = plan.encoded.values()
    assert of is y
    chosen = torch.cat([torch.arange(a, b) for a, b in plan.quantized])
    wanted = INT8.quantize_rows(y[0][chosen], ONEDNN)
    # y was rounded to BF16 on its way out, its codes too: nothing is left to differ.
    assert torch.equal(rows.scale, wanted.scale)
    assert torch.equal(rows.codes_plus_128, wanted.codes_plus_128)


@pytest.mark.parametrize("name", PLANS)
def test_a_fused_mlp_is_the_mlp(layer, name):
    plan = PhasePlan(PLANS[name].rows, PLANS[name].quantized, PLANS[name].precise)
    mlp = layer.mlp
    torch.manual_seed(0)
    x = torch.randn(1, plan.rows, 64).bfloat16()
    plain = type(mlp).forward(mlp, x)
    assert torch.equal(mlp(x), plain)
    with in_force(PhasePlan(plan.rows, plan.quantized, plan.precise)):
        unfused = type(mlp).forward(mlp, x)
    with in_force(plan):
        got = mlp(x)
    for start, stop in plan.quantized:
        # Both are some percent from BF16; from each other, a rounding to BF16 apart.
        assert distance(unfused[0, start:stop], got[0, start:stop]) < 0.01
        assert distance(plain[0, start:stop], got[0, start:stop]) > 0.001
    for start, stop in plan.precise:
        assert torch.equal(got[0, start:stop], type(mlp).forward(mlp, x[:, start:stop])[0])
    told = torch.zeros(plan.rows, dtype=torch.bool)
    for start, stop in (*plan.quantized, *plan.precise):
        told[start:stop] = True
    assert (got[0, ~told] == 0).all()


def test_a_row_is_the_same_whatever_its_batch(layer):
    torch.manual_seed(1)
    x = torch.randn(1, 200, 64).bfloat16()
    with in_force(PhasePlan(200, ((0, 200),), ())):
        whole = layer.mlp(layer.input_layernorm(x))
    for start, stop in ((0, 1), (0, 17), (50, 180)):
        with in_force(PhasePlan(stop - start, ((0, stop - start),), ())):
            part = layer.mlp(layer.input_layernorm(x[:, start:stop]))
        assert torch.equal(whole[:, start:stop], part)


@pytest.mark.parametrize("rows", [2, 40, 161])
def test_an_mlp_in_blocks_of_rows_is_the_mlp(layer, rows, monkeypatch):
    torch.manual_seed(2)
    x = torch.randn(1, rows, 64).bfloat16()

    def run():
        with in_force(PhasePlan(rows, ((0, rows - 1),), ((rows - 1, rows),))):
            return layer.mlp(x)

    whole = run()
    monkeypatch.setattr(fusion, "_MLP_BLOCK_ROWS", 16)
    assert torch.equal(whole, run())


@pytest.mark.parametrize(
    ("name", "norms", "mlps"),
    [("llama", 4, 2), ("qwen3", 4, 2), ("phi3", 4, 0), ("qwen3_5", 0, 4), ("gemma4", 0, 2)],
)
def test_what_is_fused(name, norms, mlps):
    """Gemma's and Qwen3.5's norms are written otherwise, and Phi-3's MLP is: they are left alone."""
    names = fused(mixquant.prepare(build(name), RECIPE))
    assert len([n for n in names if n.endswith("norm")]) == norms
    assert len([n for n in names if n.endswith("mlp")]) == mlps


@pytest.mark.parametrize("changes", [{"preset": "exact"}, {"format": "fp8"}])
def test_nothing_is_fused_for_other_formats(changes):
    assert fused(mixquant.prepare(build("llama"), {**RECIPE, **changes})) == []


def test_a_hook_on_a_layer_inside_is_still_called(layer):
    seen = []
    handle = layer.mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    try:
        with in_force(PhasePlan(40, ((0, 40),), ())):
            layer.mlp(torch.randn(1, 40, 64).bfloat16())
    finally:
        handle.remove()
    assert seen == [1]


def test_a_whole_model_fused_is_as_near_to_bf16_as_unfused(monkeypatch):
    ids = tokens(150)
    plain = build("llama")
    model = mixquant.prepare(build("llama"), RECIPE)
    with torch.no_grad(), mixquant.phase("prefill"):
        with_fusion = model(ids).logits
        for module in model.model.modules():
            if isinstance(vars(module).get("forward"), Method):
                del module.forward
        without = model(ids).logits
        expected = plain(ids).logits
    assert not torch.equal(with_fusion, without)
    assert distance(expected, with_fusion) < 1.3 * distance(expected, without)
