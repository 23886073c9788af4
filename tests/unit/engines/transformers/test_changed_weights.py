"""The Transformers engine after its weights have changed: no prefill runs on a copy of old ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import mixquant
from mixquant import PrepareError, Recipe
from mixquant.core.fingerprint import Origin, changed, sample
from mixquant.engines.transformers import everything_in_prefill_format, module, passes
from mixquant.engines.transformers.module import PhaseLinear
from mixquant.formats.base import EMULATION, Kernel
from mixquant.formats.int8 import INT8

FAST = Recipe(preset="fast", format="int8", min_prefill_tokens=0)
PROMPT = tokens(40)

pytestmark = pytest.mark.usefixtures("inference")


def prepared(model: PreTrainedModel, recipe: Recipe = FAST) -> PreTrainedModel:
    return mixquant.prepare(copy.deepcopy(model), recipe)


def prefill(model: Any) -> Tensor:
    with mixquant.phase("prefill"):
        logits: Tensor = model(input_ids=PROMPT).logits
    return logits


def adapted(name: str) -> bool:
    return name.endswith(("q_proj", "down_proj"))


def merge(model: nn.Module, sign: float = 1.0) -> None:
    """What PEFT does to merge an adapter: same tensor, same address, same version."""
    for number, (name, linear) in enumerate(model.named_modules()):
        if isinstance(linear, nn.Linear) and adapted(name):
            torch.manual_seed(number)
            rows, columns = linear.weight.shape
            delta = torch.randn(rows, 4) @ torch.randn(4, columns) / 32
            before = linear.weight.data_ptr(), linear.weight._version
            linear.weight.data += sign * delta.to(linear.weight.dtype)
            assert (linear.weight.data_ptr(), linear.weight._version) == before


# --- the sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 40), (40, 1), (7, 5), (3, 64), (64, 3), (64, 64), (33, 30), (16, 4096), (96, 64)],
)
def test_a_sample_has_some_of_every_row_and_column(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.int64)
    # Each element says where it stands: as the bits of its number, as far as they go.
    for place in (numbers // shape[1], numbers % shape[1]):
        weight = place.view(shape).to(torch.float32)
        if dtype == torch.bfloat16:
            weight = place.view(shape).to(torch.int16).view(torch.bfloat16)
        found = sample(weight).clone()
        bits = found.view(torch.int16 if dtype == torch.bfloat16 else torch.float32)
        assert set(bits.flatten().tolist()) == set(place.tolist())
    large = torch.zeros(576, 1536, dtype=dtype)
    assert sample(large).nbytes < large.nbytes / 50
    assert sample(large).untyped_storage().data_ptr() == large.data_ptr()  # nothing is copied


def test_a_sample_of_a_matrix_that_is_laid_out_otherwise() -> None:
    stored = torch.randn(40, 24)
    for weight in (stored.t(), stored[:, 1:], stored.flatten()[1:].view(-1)[:48].view(8, 6)):
        kept = Origin(weight)
        assert changed([(kept, weight)]) == [False]
        weight.data[3] += 1
        assert changed([(kept, weight)]) == [True]


def test_another_tensor_at_the_same_address_is_another() -> None:
    """As after an old weight was freed: same address, same version, and here even the same numbers."""
    memory = torch.randn(16, 16)
    first = nn.Parameter(memory)
    kept = Origin(first)
    assert kept.looks_like(first)
    second = nn.Parameter(memory)
    assert (first.data_ptr(), first._version) == (second.data_ptr(), second._version)
    assert not kept.looks_like(second)
    number = id(first)
    del first
    assert not kept.looks_like(second), number


# --- changes -------------------------------------------------------------------------------------


def test_a_merged_adapter_is_noticed_and_so_is_its_removal() -> None:
    plain = build("llama")
    model = prepared(plain)
    before = prefill(model)
    merge(plain)
    merge(model)
    assert torch.equal(prefill(model), prefill(prepared(plain)))
    assert not torch.equal(prefill(model), before)
    merge(plain, -1.0)
    merge(model, -1.0)
    assert torch.equal(prefill(model), prefill(prepared(plain)))


def test_generate_notices_a_merged_adapter() -> None:
    plain = build("phi3")
    model = prepared(plain)
    kwargs: dict[str, Any] = {
        "max_new_tokens": 2,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    model.generate(PROMPT, **kwargs)
    for one in (plain, model):
        one.model.layers[0].mlp.gate_up_proj.weight.data.mul_(1.5)
    ours, wanted = (each.generate(PROMPT, **kwargs).logits for each in (model, prepared(plain)))
    assert all(map(torch.equal, ours, wanted))


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.25


def one_row(weight: nn.Parameter) -> None:
    weight.data[5] *= -1


def one_column(weight: nn.Parameter) -> None:
    weight.data[:, 17] *= -1


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().view(torch.int16).numpy()[:] += 8


@pytest.mark.parametrize("change", [replace_data, one_row, one_column, through_numpy])
def test_a_change_behind_the_back_of_autograd_is_noticed(
    change: Callable[[nn.Parameter], None],
) -> None:
    plain = build("llama")
    model = prepared(plain)
    before = prefill(model)
    for one in (plain, model):
        change(one.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(prefill(model), prefill(prepared(plain)))
    assert not torch.equal(prefill(model), before)


def test_weights_that_have_no_version_are_noticed_too() -> None:
    with torch.inference_mode():
        plain, other = build("llama"), build("llama", seed=1)
        model = mixquant.prepare(copy.deepcopy(plain), FAST)
        assert model.lm_head.weight.is_inference()
        before = prefill(model)
        model.load_state_dict(other.state_dict())
        assert torch.equal(prefill(model), prefill(mixquant.prepare(other, FAST)))
        assert not torch.equal(prefill(model), before)


def test_only_what_has_changed_is_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(build("llama"))
    prefill(model)
    made: list[str] = []
    requantize = PhaseLinear.requantize

    def counted(layer: PhaseLinear) -> Any:
        made.append(layer.name)
        return requantize(layer)

    monkeypatch.setattr(PhaseLinear, "requantize", counted)
    prefill(model)
    assert made == []
    model.model.layers[1].mlp.up_proj.weight.data += 1
    prefill(model)
    assert made == ["model.layers.1.mlp.up_proj"]


def test_decode_does_not_look_at_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(passes, "renew", lambda model: looks.append(1))
    model = prepared(build("llama"))
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    model.generate(PROMPT, **kwargs)
    assert len(looks) == 1
    with everything_in_prefill_format():
        model.generate(PROMPT, **kwargs)
        assert len(looks) == 2
        model.generate(PROMPT[:, :1], **kwargs)  # a prompt, if a short one
        assert len(looks) == 3
    model(PROMPT)  # no phase: precise
    assert len(looks) == 3


def test_requantize_is_for_what_no_sample_shows() -> None:
    plain = build("llama")
    model = prepared(plain)
    before = prefill(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    seen = torch.zeros_like(weight)
    sample(seen).fill_(-1)
    row, column = (seen == 0).nonzero()[0].tolist()
    for one in (plain, model):
        one.model.layers[0].mlp.up_proj.weight.data[row, column] = 8.0
    mixquant.requantize(model)
    assert torch.equal(prefill(model), prefill(prepared(plain)))
    assert not torch.equal(prefill(model), before)


def test_requantize_needs_a_prepared_model() -> None:
    with pytest.raises(PrepareError, match="not prepared"):
        mixquant.requantize(build("llama"))
    mixquant.requantize(prepared(build("llama"), Recipe(preset="exact")))  # nothing to do


@pytest.mark.parametrize("how", ["prefill", "requantize"])
def test_a_weight_that_was_damaged_since_is_refused_by_name(how: str) -> None:
    model = prepared(build("llama"))
    model.model.layers[1].mlp.down_proj.weight.data[:, 3] = float("nan")
    with pytest.raises(PrepareError, match=r"model\.layers\.1\.mlp\.down_proj holds NaN"):
        prefill(model) if how == "prefill" else mixquant.requantize(model)


def test_a_weight_that_was_offloaded_since_is_refused_by_name() -> None:
    model = prepared(build("llama"))
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(PrepareError, match=r"layers\.0\.mlp\.gate_proj is not in memory"):
        prefill(model)


def test_an_output_head_that_has_grown_is_quantized_as_a_whole() -> None:
    recipe = Recipe(preset="fast", format="int8", min_prefill_tokens=0, ignore=())
    plain = build("llama")
    model = prepared(plain, recipe)
    prefill(model)
    for one in (plain, model):
        one.lm_head.weight = nn.Parameter(torch.cat([one.lm_head.weight, one.lm_head.weight[:16]]))
    assert torch.equal(prefill(model), prefill(prepared(plain, recipe)))
    layers = {layer.name: layer for layer in mixquant.summary(model).layers}
    assert layers["lm_head"].shape == (272, 64)


def test_a_layer_that_was_replaced_is_told_as_bf16() -> None:
    model = prepared(build("llama"), Recipe(preset="fast", format="int8", ignore=()))
    before = mixquant.summary(model)
    model.resize_token_embeddings(272)  # Transformers makes another output head
    after = mixquant.summary(model)
    head = next(layer for layer in after.layers if layer.name == "lm_head")
    assert (head.format, head.nbytes) == ("bf16", 0)
    assert "another module" in (head.why_precise or "")
    assert after.extra_bytes < before.extra_bytes


def test_parts_that_no_longer_fit_are_refused() -> None:
    recipe = Recipe.from_dict(
        {"format": {"default": "int8", "up_proj": "bf16"}, "min_prefill_tokens": 0}
    )
    model = prepared(build("phi3"), recipe)
    layer = model.model.layers[0].mlp.gate_up_proj
    layer.weight = nn.Parameter(layer.weight[:-16])
    with pytest.raises(PrepareError, match=r"gate_up_proj has 176 rows now, not 192"):
        prefill(model)


def test_a_copy_for_another_device_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the kernel of a device that a model is moved to, and for what it cannot hold."""
    plain = build("llama")
    model = prepared(plain)
    elsewhere = Kernel("elsewhere", native=True)
    monkeypatch.setattr(type(INT8), "kernel", lambda fmt, device: elsewhere)
    monkeypatch.setattr(
        type(INT8), "why_not", lambda fmt, n, k, kernel: "odd" if (n, k) == (96, 64) else None
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as a move to a device does
    logits = prefill(model)
    layers = {layer.name: layer for layer in mixquant.summary(model).layers}
    moved = layers["model.layers.0.mlp.down_proj"]
    assert (moved.format, moved.kernel, moved.native) == ("int8", "elsewhere", True)
    left = layers["model.layers.0.mlp.up_proj"]
    assert (left.format, left.nbytes) == ("bf16", 0)
    assert "int8 cannot hold it on cpu" in (left.why_precise or "")
    monkeypatch.undo()
    ignoring = Recipe(
        preset="fast",
        format="int8",
        min_prefill_tokens=0,
        ignore=("lm_head", "*.up_proj", "*.gate_proj"),
    )
    monkeypatch.setattr(type(INT8), "kernel", lambda fmt, device: EMULATION)
    assert torch.equal(logits, prefill(prepared(plain, ignoring)))


# --- PEFT ------------------------------------------------------------------------------------------


def with_adapter(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_and_unloads(safe: bool) -> None:
    plain = with_adapter(build("llama"))
    model = with_adapter(prepared(build("llama")))
    before = prefill(model)
    merged, wanted = (each.merge_and_unload(safe_merge=safe) for each in (model, plain))
    assert torch.equal(prefill(merged), prefill(prepared(wanted)))
    assert not torch.equal(prefill(merged), before)
    assert len(mixquant.summary(merged).layers) == 15


def test_peft_merges_and_takes_back() -> None:
    # Not INT8, whose rows are quantized in one loop with a norm or an activation, but not behind PEFT.
    fp8 = Recipe(preset="fast", format="fp8", min_prefill_tokens=0)
    plain, model = with_adapter(build("llama")), with_adapter(prepared(build("llama"), fp8))
    apart = prefill(model)
    for each in (plain, model):
        each.merge_adapter()
    merged = prefill(model)
    for each in (plain, model):
        each.unmerge_adapter()
    taken_back = prefill(model)
    fresh = with_adapter(build("llama"))
    fresh.merge_adapter()
    assert torch.equal(merged, prefill(prepared(fresh.merge_and_unload(), fp8)))
    assert not torch.equal(merged, apart)
    # BF16 does not give back every bit of what was added and taken away.
    assert (taken_back - apart).norm() < 0.2 * apart.norm()
    generated = model.generate(input_ids=PROMPT, max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 42)


def test_layers_in_peft_adapters_are_known_by_their_names() -> None:
    recipe = Recipe.from_dict(
        {"format": {"default": "fp8", "q_proj": "bf16"}, "min_prefill_tokens": 0}
    )
    inside = with_adapter(build("llama")).get_base_model()
    layers = {layer.name: layer for layer in mixquant.summary(prepared(inside, recipe)).layers}
    plain = {
        layer.name: layer for layer in mixquant.summary(prepared(build("llama"), recipe)).layers
    }
    assert layers == plain
    assert layers["model.layers.0.self_attn.q_proj"].format == "bf16"


@pytest.mark.slow
def test_the_cost_of_looking_is_far_below_a_prefill(smollm2_path: Path) -> None:
    """The bound is loose, for a machine that is shared."""
    import time

    from mixquant.checkpoints import models

    model, _ = models.load(str(smollm2_path))
    mixquant.prepare(model, FAST)
    ids = torch.randint(100, 40000, (1, 128), generator=torch.Generator().manual_seed(0))

    def seconds(what: Callable[[], object]) -> float:
        begun = time.process_time()
        what()
        return time.process_time() - begun

    def read() -> None:
        with mixquant.phase("prefill"):
            model(ids, logits_to_keep=1)

    read()
    looking = min(seconds(lambda: module.renew(model)) for _ in range(5))
    assert looking < 0.1 * min(seconds(read) for _ in range(2))
