"""SDPA whose single queries are fast on a CPU: ``attn_implementation="mixquant_sdpa"``.

PyTorch's SDPA for CPUs multiplies a single BF16 query with the keys by a slow path, once for each head.
With two queries or more it takes the fast one. So the query heads that share a key head become rows of
that head, and a head that shares its keys with none has its query twice. What is computed is the same;
the order of the sums is not, so some results differ in their last bit from those of ``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ENOUGH = 2  # rows of a head, for the fast path


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for Transformers: what is not one BF16 query on a CPU is ``sdpa``'s.

    Args:
        query: ``[B, H, R, D]``.
        key, value: ``[B, G, N, D]``; query head h reads head ``h // (H // G)``.
        attention_mask: None, or what ``sdpa`` takes.

    Returns:
        ``[B, R, H, D]``, and None.
    """
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    sequences, heads, rows, size = query.shape
    own = key.shape[1]  # key heads
    if (
        rows != 1
        or not query.is_cpu
        or query.dtype != torch.bfloat16
        or heads % own
        or (attention_mask is not None and attention_mask.shape[1] != 1)
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache") is not None
    ):
        return stock(module, query, key, value, attention_mask, *args, **kwargs)
    shared = heads // own
    folded = query.reshape(sequences, own, shared, size)
    if shared < _ENOUGH:
        folded = folded.expand(-1, -1, _ENOUGH, -1)
    # Through `sdpa` itself, told that no heads are shared and that nothing is hidden from any row.
    arguments = {**kwargs, "is_causal": False}
    out, weights = stock(_NOTHING_SHARED, folded, key, value, attention_mask, *args, **arguments)
    out = out[:, :shared].transpose(1, 2)  # [B, G, shared, D]
    return out.reshape(sequences, 1, heads, size), weights


_NOTHING_SHARED = nn.Module()
