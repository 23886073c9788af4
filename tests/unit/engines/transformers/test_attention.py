"""Which rows of a prepared model attend in the kernel for CPUs, and that all others stay SDPA's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import build, distance, left_padded, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import mixquant
from mixquant.core.phase import PhasePlan
from mixquant.engines.transformers import attention
from mixquant.engines.transformers.attended_rows import AttendedRows
from mixquant.engines.transformers.attention import as_decode_steps
from mixquant.engines.transformers.passes import everything_in_prefill_format, only_attention
from mixquant.kernels.cpu import attention as kernel

pytestmark = pytest.mark.usefixtures("inference")

HAS_VNNI = torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="the processor has no AVX-512 VNNI")
needs_bf16 = pytest.mark.skipif(
    not (HAS_VNNI and torch.cpu._is_avx512_bf16_supported()),
    reason="the processor has no AVX-512 BF16",
)

ALL = {"format": "int8", "min_prefill_tokens": 1, "ignore": ()}
# Every product precise, attention alone in INT8.
ALONE = {"preset": "exact", "prefill_attention": "int8", "min_prefill_tokens": 1}


def model(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return build(name, **{"head_dim": 32, "initializer_range": 0.05, **changes})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the kernel was asked for, call by call."""
    seen: list[dict[str, Any]] = []
    attend = kernel.attend

    def record(q: Tensor, k: Tensor, v: Tensor, rows: Any, padding: Any, *rest: Any) -> None:
        asked = {"rows": list(rows), "padding": list(padding), "keys": k.shape[2]}
        seen.append({**asked, "precision": rest[1]})
        attend(q, k, v, rows, padding, *rest)

    monkeypatch.setattr(kernel, "attend", record)
    yield seen


def prefill(prepared: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    with mixquant.phase("prefill"):
        return prepared(*args, **kwargs)


def attention_line(prepared: PreTrainedModel) -> str:
    return next((line for line in mixquant.summary(prepared).patches), "")


@needs_vnni
def test_quantized_rows_attend_in_int8_and_the_table_says_so(calls: list[Any]) -> None:
    prepared = mixquant.prepare(model(), {**ALL, "precise_head": 3, "precise_tail": 2})
    prefill(prepared, tokens(40))
    assert calls == [{"rows": [(3, 38)], "padding": [0], "keys": 40, "precision": "int8"}] * 2
    assert attention_line(prepared) == "attention of quantized rows: INT8 in our kernel, 2 layers"
    assert attention_line(prepared) in str(mixquant.summary(prepared))


@needs_bf16
def test_in_bf16_by_the_recipe(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    prepared = mixquant.prepare(model(), {**ALL, "prefill_attention": "bf16"})
    prefill(prepared, tokens(40))
    assert {call["precision"] for call in calls} == {"bf16"}
    assert attention_line(prepared) == "attention of quantized rows: BF16 in our kernel, 2 layers"


@needs_vnni
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_attention_alone_is_near_the_plain_model(name: str) -> None:
    plain = model(name)
    wanted = plain(tokens(200)).logits
    prepared = mixquant.prepare(plain, ALONE)
    assert distance(wanted, prefill(prepared, tokens(200)).logits) < 0.02


@needs_vnni
def test_without_a_phase_every_bit_is_as_before(calls: list[Any]) -> None:
    plain = model()
    wanted = plain(tokens(40)).logits
    prepared = mixquant.prepare(plain, ALL)
    prefill(prepared, tokens(40))
    calls.clear()
    assert torch.equal(prepared(tokens(40)).logits, wanted)
    with mixquant.phase("decode"):
        assert torch.equal(prepared(tokens(40)).logits, wanted)
    assert not calls


@needs_vnni
def test_passes_below_the_threshold_are_as_before(calls: list[Any]) -> None:
    plain = model()
    wanted = plain(tokens(40)).logits
    prepared = mixquant.prepare(plain, {**ALL, "min_prefill_tokens": 64})
    assert torch.equal(prefill(prepared, tokens(40)).logits, wanted)
    assert not calls


@needs_vnni
def test_decode_steps_are_sdpas(calls: list[Any]) -> None:
    prepared = mixquant.prepare(model(), ALL)
    prepared.generate(tokens(40), max_new_tokens=5, do_sample=False)
    assert [call["rows"] for call in calls] == [[(0, 39)]] * 2
    calls.clear()
    with everything_in_prefill_format():
        prepared.generate(tokens(40), max_new_tokens=5, do_sample=False)
    assert [call["rows"] for call in calls] == [[(0, 40)]] * 2
    calls.clear()
    with everything_in_prefill_format(), as_decode_steps():
        prepared(tokens(40))
    assert not calls


@needs_vnni
def test_other_models_are_left_alone(calls: list[Any]) -> None:
    mixquant.prepare(model(), ALL)
    other = model()
    wanted = other(tokens(40)).logits
    assert torch.equal(prefill(other, tokens(40)).logits, wanted)
    assert not calls


@needs_vnni
def test_a_padded_batch(calls: list[Any]) -> None:
    plain = model()
    batch = left_padded([tokens(30, 1), tokens(50, 2), tokens(41, 3)])
    wanted = plain(**batch).logits
    prepared = mixquant.prepare(plain, {**ALONE, "precise_head": 2})
    got = prefill(prepared, **batch).logits
    assert calls[0]["padding"] == [20, 0, 9]
    assert calls[0]["rows"] == [(22, 49), (2, 49), (11, 49)]
    for row, padding in enumerate((20, 0, 9)):
        assert distance(wanted[row, padding:], got[row, padding:]) < 0.02


@needs_vnni
def test_precise_rows_of_a_pass_with_others_are_sdpas() -> None:
    # All keys are precise here, so what SDPA makes of the precise rows is what it always makes, but for
    # the order of its sums.
    plain = model(num_hidden_layers=1)
    wanted = plain(tokens(60)).logits
    prepared = mixquant.prepare(plain, {**ALONE, "precise_head": 5, "precise_tail": 7})
    got = prefill(prepared, tokens(60)).logits
    for rows in (slice(0, 5), slice(53, 60)):
        assert distance(wanted[:, rows], got[:, rows]) < 0.004
    assert distance(wanted[:, 5:53], got[:, 5:53]) < 0.02


@needs_vnni
@pytest.mark.parametrize("static", [False, True])
def test_chunks_behind_a_cache(calls: list[Any], static: bool) -> None:
    plain = model()
    wanted = plain(tokens(150)).logits
    prepared = mixquant.prepare(plain, ALONE)
    cache = StaticCache(prepared.config, max_cache_len=200) if static else None
    parts = []
    with mixquant.phase("prefill", prompt_length=150):
        for start, stop in ((0, 64), (64, 101), (101, 150)):
            out = prepared(tokens(150)[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert [call["rows"][0] for call in calls[::2]] == [(0, 64), (0, 37), (0, 48)]
    assert [call["keys"] for call in calls[::2]] == [64, 101, 150]
    assert distance(wanted, torch.cat(parts, 1)) < 0.02


@needs_vnni
def test_a_padded_batch_in_chunks() -> None:
    plain = model()
    batch = left_padded([tokens(60, 1), tokens(90, 2)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = plain(**batch).logits
    prepared = mixquant.prepare(plain, ALONE)
    with mixquant.phase("prefill", prompt_length=[60, 90]):
        first = prepared(ids[:, :50], attention_mask=mask[:, :50], use_cache=True)
        second = prepared(ids[:, 50:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    assert distance(wanted[0, 30:], got[0, 30:]) < 0.02
    assert distance(wanted[1], got[1]) < 0.02


@needs_vnni
def test_sliding_windows_are_sdpas_from_where_they_are_full(calls: list[Any]) -> None:
    plain = build("gemma4", initializer_range=0.05, head_dim=32, global_head_dim=64)
    prepared = mixquant.prepare(plain, ALL)
    assert "sliding window" in attention_line(prepared)
    prefill(prepared, tokens(12))
    assert len(calls) == 2
    calls.clear()
    prefill(prepared, tokens(60))  # a window of 16
    assert len(calls) == 1


def test_head_sizes_that_the_kernel_lacks_are_named() -> None:
    prepared = mixquant.prepare(build("llama"), ALL)  # heads of 16
    why = "PyTorch's in 2 layers (heads of 16)" if HAS_VNNI else "the processor has no"
    assert why in attention_line(prepared)


def test_another_implementation_is_named() -> None:
    plain = model()
    plain.set_attn_implementation("eager")
    prepared = mixquant.prepare(plain, ALL)
    assert "attn_implementation 'eager', not 'sdpa'" in attention_line(prepared)


@needs_vnni
def test_ours_for_single_queries_goes_with_it(calls: list[Any]) -> None:
    plain = model()
    plain.set_attn_implementation("mixquant_sdpa")
    prepared = mixquant.prepare(plain, ALL)
    assert "INT8 in our kernel, 2 layers" in attention_line(prepared)
    prefill(prepared, tokens(40))
    assert len(calls) == 2


def test_other_types_are_named() -> None:
    prepared = mixquant.prepare(model().float(), ALL)
    why = "PyTorch's in 2 layers (it is in float32)" if HAS_VNNI else "the processor has no"
    assert why in attention_line(prepared)


def test_without_the_kernel_the_table_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "why_unavailable", lambda precision: "there is no C++ compiler c++")
    plain = model()
    wanted = plain(tokens(40)).logits
    prepared = mixquant.prepare(plain, ALONE)
    line = "attention: PyTorch's (there is no C++ compiler c++)"
    assert attention_line(prepared) == line
    assert line in " ".join(str(mixquant.summary(prepared)).split())
    assert torch.equal(prefill(prepared, tokens(40)).logits, wanted)


@pytest.mark.parametrize(
    "recipe", [{"preset": "exact"}, {"preset": "exact", "prefill_attention": "bf16"}]
)
def test_where_nothing_is_quantized_nothing_is_said_or_changed(
    calls: list[Any], recipe: dict[str, Any]
) -> None:
    plain = model()
    wanted = plain(tokens(40)).logits
    prepared = mixquant.prepare(plain, {**recipe, "min_prefill_tokens": 1})
    assert not attention_line(prepared)
    assert torch.equal(prefill(prepared, tokens(40)).logits, wanted)
    assert not calls


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"scaling": -1.0}, "scaling"),
        ({"is_causal": False}, "not causal"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"value": torch.zeros(1, 2, 8, 64).bfloat16()}, "heads of 32 and 64"),
        (
            {
                "key": torch.zeros(1, 3, 8, 32).bfloat16(),
                "value": torch.zeros(1, 3, 8, 32).bfloat16(),
            },
            "heads",
        ),
        ({"position_ids": torch.arange(8), "sliding_window": 4, "softcap": None}, None),
        ({}, None),
    ],
)
def test_what_is_not_known_to_be_plain_is_sdpas(changes: dict[str, Any], says: str | None) -> None:
    x = torch.zeros(1, 2, 8, 32).bfloat16()
    query = torch.zeros(1, 4, 8, 32).bfloat16()
    call: dict[str, Any] = {"query": query, "key": x, "value": x, "attention_mask": None, **changes}
    why = attention.why_not_kernel(nn.Module(), **call)
    assert why is None if says is None else says in (why or "")


def test_attention_alone_quantizes_nothing() -> None:
    plan = attention.plan_of_attention_alone(PhasePlan(10, ((0, 9),), ((9, 10),)))
    assert plan.quantized_rows == 0
    assert plan.derived(AttendedRows, lambda _: AttendedRows(())).ranges == ((0, 9),)


@needs_bf16
def test_the_arm_of_attention_alone(calls: list[Any]) -> None:
    plain = model()
    wanted = plain(tokens(150)).logits
    prepared = mixquant.prepare(plain, ALL)
    with only_attention():
        got = prefill(prepared, tokens(150)).logits
        assert torch.equal(prepared(tokens(150)).logits, wanted)
    assert [call["precision"] for call in calls] == ["bf16"] * 2
    assert distance(wanted, got) < 0.01


@needs_vnni
def test_a_copy_attends_as_the_model_does(calls: list[Any]) -> None:
    prepared = mixquant.prepare(model(), ALL)
    wanted = prefill(prepared, tokens(40)).logits
    assert torch.equal(prefill(copy.deepcopy(prepared), tokens(40)).logits, wanted)
    assert len(calls) == 4


@needs_vnni
def test_gradients_are_refused_as_products_refuse_them() -> None:
    prepared = mixquant.prepare(model(), ALONE)
    with torch.enable_grad(), mixquant.phase("prefill"):
        loss = prepared(tokens(40)).logits.float().sum()
        with pytest.raises(RuntimeError, match="a quantized prefill has no gradients"):
            loss.backward()
