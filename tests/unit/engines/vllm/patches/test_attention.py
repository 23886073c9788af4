"""Which attention layers of a model attend in FP8, and what the table says of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_engines import require_vllm

require_vllm()

from mixquant.core.recipe import Recipe  # noqa: E402
from mixquant.engines.vllm import hardware, versions  # noqa: E402
from mixquant.engines.vllm.attention.layers import PrefillAttention  # noqa: E402
from mixquant.engines.vllm.patches import attention  # noqa: E402
from mixquant.engines.vllm.patches.attention import patch_attention  # noqa: E402


def flash_implementation(**changes: Any) -> Any:
    values = {
        "kv_cache_dtype": "auto",
        "head_size": 128,
        "sliding_window": (-1, -1),
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "dcp_world_size": 1,
        "num_heads": 8,
        "num_kv_heads": 2,
        "scale": 0.1,
    }
    one = type("FlashAttentionImpl", (), {})()
    one.__dict__.update(values | changes)
    return one


class Plain:
    """Stands for vLLM's `Attention`."""


class ChunkedLocal(Plain):
    """Stands for a layer that derives from it, whose metadata are of virtual sequences."""


PLAIN = Plain()


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "is_hopper", lambda: True)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(versions, "attention_layer_class", lambda: Plain)


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"head_size": 64}, None),
        ({"head_size": 96}, "head size 96"),
        ({"kv_cache_dtype": "fp8"}, "KV cache"),
        ({"sliding_window": (127, 0)}, "sliding window"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "capped"),
        ({"sinks": torch.ones(2)}, "sinks"),
        ({"dcp_world_size": 2}, "context parallelism"),
        ({"kv_sharing_target_layer_name": None}, None),
        ({"kv_sharing_target_layer_name": "model.layers.3"}, "another layer's keys"),
        ({"attn_type": "encoder_only"}, "decoder"),
    ],
)
def test_layers_that_stay_bf16_say_why(changes: dict[str, Any], word: str | None) -> None:
    why = attention.why_bf16(PLAIN, flash_implementation(**changes), torch.bfloat16)
    assert why is None if word is None else word in str(why)


@pytest.mark.usefixtures("_hopper")
def test_other_types_and_layers_stay_bf16() -> None:
    one = flash_implementation()
    assert "BF16" in str(attention.why_bf16(PLAIN, one, torch.float16))
    other = type("MlaImpl", (), {})()
    assert "MlaImpl" in str(attention.why_bf16(PLAIN, other, torch.bfloat16))
    assert "ChunkedLocal" in str(attention.why_bf16(ChunkedLocal(), one, torch.bfloat16))


@pytest.mark.parametrize(
    ("capability", "cuda"),
    [(None, None), ((8, 9), "13.0"), ((10, 0), "13.0"), ((12, 0), "13.0"), ((9, 0), None)],
)
def test_other_machines_stay_bf16(
    capability: tuple[int, int] | None, cuda: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is ROCm, which calls its devices cuda, too."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(hardware, "is_hopper", hardware.is_hopper.__wrapped__)
    why = attention.why_bf16(PLAIN, flash_implementation(), torch.bfloat16)
    assert why is not None and "9.0" in why


def test_vllms_other_attention_layers_derive_from_the_plain_one() -> None:
    """So that a look at the class tells them apart."""
    from vllm.model_executor.layers import attention as layers

    plain = versions.attention_layer_class()
    assert plain.__name__ == "Attention"
    assert issubclass(layers.ChunkedLocalAttention, plain) and plain is not (
        layers.ChunkedLocalAttention
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "is_hopper", lambda: True)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert "fa3-fwd" in str(attention.why_bf16(PLAIN, flash_implementation(), torch.bfloat16))


@pytest.mark.usefixtures("_hopper")
def test_what_a_model_does_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Layer(torch.nn.Module, AttentionLayerBase):
        def __init__(self, head_size: int) -> None:
            super().__init__()
            self.impl = flash_implementation(head_size=head_size, forward=lambda *args: None)
            self.dtype = torch.bfloat16

        def get_attn_backend(self) -> Any: ...

        def get_kv_cache_spec(self, vllm_config: Any) -> Any: ...

    monkeypatch.setattr(versions, "attention_layer_class", lambda: Layer)
    model = torch.nn.ModuleList([Layer(128), Layer(80), Layer(128)])
    fast = Recipe(preset="fast").resolved(frozenset({"fp8"}))
    for _ in range(2):  # also when it is loaded anew
        outcome, one = patch_attention(model, fast)
        why = "1: head size 80; expected one of (64, 128, 256)"
        assert str(outcome) == f"attention in FP8: 2 of 3 ({why})"
    assert one in (model[0].impl.forward, model[2].impl.forward)
    work = one.workspace(700, 100_000, torch.device("cpu"))
    assert (work.q.shape, work.k.shape) == ((700, 8, 128), (100_000, 2, 128))
    assert work.partial.shape == (2, 700, 8, 128)
    assert isinstance(model[0].impl.forward, PrefillAttention)
    assert not isinstance(model[0].impl.forward._forward, PrefillAttention)
    assert not isinstance(model[1].impl.forward, PrefillAttention)
    others = [Recipe(preset="fast", prefill_attention=name) for name in ("bf16", "int8")]
    for recipe in (Recipe(preset="exact"), *others):
        model = torch.nn.ModuleList([Layer(128)])
        outcome, one = patch_attention(model, recipe.resolved(frozenset({"fp8"})))
        assert (outcome.reasons, one) == ((), None)
        assert not isinstance(model[0].impl.forward, PrefillAttention)
