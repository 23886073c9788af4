"""Attention of vLLM whose quantized rows attend in FP8, over vLLM's BF16 KV cache.

Attention is most of a long prompt's prefill. Where it pays, the quantized rows of a pass attend in FP8
to the keys before their chunk (`mixquant.engines.vllm.attention.fp8`). A prompt's first chunk attends in
BF16, with its precise rows. All other rows, decode rows among them, keep vLLM's own BF16 kernel, and the
cache stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixquant.core.phase import PhasePlan, plan_in_force
from mixquant.engines.vllm import versions
from mixquant.engines.vllm.attention.bf16_rows import Bf16Rows, bf16_rows_of
from mixquant.engines.vllm.attention.fp8 import Run, Shape, Workspace, attend
from mixquant.engines.vllm.attention.rows import (
    PRECISE_KEYS,
    AttentionPiece,
    pieces_of,
    runs_of,
    worth,
)
from mixquant.engines.vllm.context import Batch, state_of
from mixquant.engines.vllm.log import logger


class PrefillAttention:
    """What replaces the forward of one attention layer's implementation.

    Args:
        forward: the implementation's own.
        always: attend in FP8 also where that takes longer.
    """

    def __init__(self, forward: Callable[..., Tensor], implementation: Any, always: bool) -> None:
        self._forward = forward
        of = implementation
        self.shape = Shape(of.num_heads, of.num_kv_heads, of.head_size, of.scale)
        self._always = always

    def __call__(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        plan = plan_in_force()
        runs = []
        # A pass may have nothing quantized, and layers may be given fewer rows than their pass has.
        if (
            plan is not None
            and plan.quantized
            and key is not None
            and len(query) == len(key) == plan.rows
        ):
            runs = self._runs(plan, attn_metadata, query.device)
        if not runs:
            return self._forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        assert plan is not None
        cache = versions.keys_and_values(kv_cache, self.shape.size)
        for run in runs:
            attend(self.shape, run, query, key, value, cache, attn_metadata.block_table, output)
        # Afterwards, for it writes over rows that stand between pieces.
        in_bf16 = self._bf16_rows(plan, attn_metadata)
        if in_bf16 is not None and isinstance(in_bf16.rows, Tensor):
            some = query.index_select(0, in_bf16.rows)
            into = output.new_empty(in_bf16.count, *output.shape[1:])
            self._forward(
                layer, some, key, value, kv_cache, in_bf16.metadata, into, *args, **kwargs
            )
            output.index_copy_(0, in_bf16.rows, into)
        elif in_bf16 is not None:
            some, into = query[in_bf16.rows], output[in_bf16.rows]
            self._forward(
                layer, some, key, value, kv_cache, in_bf16.metadata, into, *args, **kwargs
            )
        return output

    def _worth(self, rows: int, keys: int) -> bool:
        if self._always:
            return True
        return worth(rows, keys, self.shape.heads, self.shape.kv_heads, self.shape.size)

    def _pieces(self, plan: PhasePlan, batch: Batch) -> list[AttentionPiece]:
        kept = state_of(plan).pieces
        if self.shape not in kept:
            kept[self.shape] = pieces_of(plan, batch, self._worth)
        return kept[self.shape]

    def _runs(self, plan: PhasePlan, metadata: Any, device: torch.device) -> list[Run]:
        state = state_of(plan)
        if state.batch is None or metadata is None:
            return []
        known = id(metadata)  # of each group of layers that share a cache
        if known not in state.plain:
            state.plain[known] = is_plain(metadata, state.batch, plan.rows)
        if not state.plain[known]:
            return []
        if self.shape not in state.runs:
            runs = runs_of(self._pieces(plan, state.batch), state.batch)
            state.runs[self.shape] = [Run(run, device) for run in runs]
        return state.runs[self.shape]

    def _bf16_rows(self, plan: PhasePlan, metadata: Any) -> Bf16Rows | None:
        state = state_of(plan)
        assert state.batch is not None
        key = (self.shape, id(metadata))
        if key not in state.bf16_rows:
            pieces = self._pieces(plan, state.batch)
            state.bf16_rows[key] = bf16_rows_of(state.batch, pieces, metadata)
        return state.bf16_rows[key]

    def workspace(self, rows: int, longest: int, device: torch.device) -> Workspace:
        """The most memory that a pass of so many rows may take, allocated.

        Args:
            longest: the length of the longest sequence that is served, in tokens.
        """
        return Workspace.largest(self.shape, rows, longest, device)

    def warm_up(self, device: torch.device) -> None:
        """Has the kernels compiled before the first request waits for them."""
        of = self.shape
        page = torch.zeros(2, 16, of.kv_heads, 2 * of.size, device=device).bfloat16()
        keys, values = page.split(of.size, 3)
        table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
        query = torch.zeros(1, of.heads, of.size, dtype=torch.bfloat16, device=device)
        run = Run((AttentionPiece(0, 0, 1, PRECISE_KEYS + 1),), device)
        own = (keys[0, :1], values[0, :1])
        attend(of, run, query, *own, (keys, values), table, torch.empty_like(query))


# What metadata of causal attention over whole sequences says. Anything else has to be as good as absent:
# a mask, a window, a cascade, virtual batches, rows left out.
_KNOWN = {
    "num_actual_tokens",
    "max_query_len",
    "query_start_loc",
    "max_seq_len",
    "seq_lens",
    "block_table",
    "slot_mapping",
    "scheduler_metadata",
    "max_num_splits",
    "causal",
}


def is_plain(metadata: Any, batch: Batch, rows: int) -> bool:
    """Whether a pass's metadata describe causal attention of each sequence to the whole of itself.

    Args:
        metadata: of vLLM's FlashAttention backend.
        batch: the sequences of the pass.
        rows: of the pass, with padding.
    """
    sequences = len(batch.row_counts)
    strange = [
        name
        for name, value in vars(metadata).items()
        if name not in _KNOWN
        and not (value is None or (isinstance(value, int | tuple) and value in (0, (-1, -1))))
    ]
    plain = (
        not strange
        and metadata.causal is True
        and int(batch.row_counts.sum()) <= metadata.num_actual_tokens <= rows
        and len(metadata.block_table) == len(metadata.seq_lens) == sequences
        and len(metadata.query_start_loc) == sequences + 1
    )
    if not plain:
        _say_once(", ".join(strange))
    return plain


@functools.cache
def _say_once(strange: str) -> None:
    what = f"its metadata say {strange}" if strange else "its sequences are not the pass's"
    logger.info("mixquant: attention stays BF16 in passes of one kind: %s", what)
