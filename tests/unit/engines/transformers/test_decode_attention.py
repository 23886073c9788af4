"""A single query on a CPU: as near to the exact result as SDPA, in models and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mixquant  # noqa: F401 - registers the implementation
from mixquant.engines.transformers.decode_attention import attend

pytestmark = pytest.mark.usefixtures("inference")


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(shared, 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def _module(heads: int, own: int) -> Any:
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // own, True
    return module


@pytest.mark.parametrize(("heads", "own"), [(9, 3), (8, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("keys", [1, 7, 513])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query(heads: int, own: int, size: int, keys: int, masked: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, 1, size).bfloat16()
    k, v = (torch.randn(2, own, keys, size).bfloat16() + 0.2 for _ in range(2))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[0, ..., : keys // 2] = False
    arguments = (_module(heads, own), q, k, v, mask)
    ours, weights = attend(*arguments, scaling=0.1, is_causal=None)
    stock, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, scaling=0.1, is_causal=None)
    assert weights is None
    assert ours.shape == stock.shape == (2, 1, heads, size)
    exact = _exact(q, k, v, mask, 0.1)
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (ours, stock))
    assert error <= max(1.05 * allowed, 0.003)


@pytest.mark.parametrize("what", ["rows", "float32", "a mask for each head"])
def test_all_else_is_sdpa(what: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    q = torch.randn(1, 4, 5 if what == "rows" else 1, 64).to(dtype)
    k, v = (torch.randn(1, 2, 9, 64).to(dtype) for _ in range(2))
    mask = torch.rand(1, 4, 1, 9) < 0.5 if what == "a mask for each head" else None
    if mask is not None:
        mask[..., 0] = True
    arguments = (_module(4, 2), q, k, v, mask)
    ours, stock = attend(*arguments)[0], ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments)[0]
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("padded", [False, True])
def test_generate(padded: bool) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    stock = model.generate(ids, **options)
    model.set_attn_implementation("mixquant_sdpa")
    ours = model.generate(ids, **options)
    # The prompt is read by sdpa; the first steps, before another token could be chosen.
    assert torch.equal(ours.logits[0], stock.logits[0])
    torch.testing.assert_close(ours.logits[1], stock.logits[1], rtol=0.02, atol=0.02)
