"""Which attention layers of vLLM attend in FP8, and which rows of a pass, over vLLM's BF16 KV cache.

Attention is most of a long prompt's prefill. Where it pays, the quantized rows of a pass attend in FP8
(`mixquant.engines.vllm.attention.fp8`). All other rows, decode rows among them, keep vLLM's own BF16
kernel, and the cache stays as it is.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixquant.core.phase import PhasePlan, plan_in_force
from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import versions
from mixquant.engines.vllm.attention.fp8 import HEAD_SIZES, Room, Run, Shape, attend, integers
from mixquant.engines.vllm.attention.rows import PRECISE_KEYS, Piece, pieces_of, runs_of, worth
from mixquant.engines.vllm.log import logger


@dataclass
class _Rest:
    """The other rows of a pass, as a pass of their own."""

    rows: Tensor | slice  # [rest] int64, or consecutive ones
    count: int
    metadata: Any


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
        runs = [] if plan is None else self._runs(plan, attn_metadata, query)
        if not runs:
            return self._forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        assert plan is not None
        keys, values = versions.keys_and_values(kv_cache, self.shape.size)
        for run in runs:
            attend(self.shape, run, query, keys, values, attn_metadata.block_table, output)
        # Afterwards, for it writes over rows that stand between pieces.
        rest = self._rest(plan, attn_metadata)
        if rest is not None and isinstance(rest.rows, Tensor):
            some = query.index_select(0, rest.rows)
            into = output.new_empty(rest.count, *output.shape[1:])
            self._forward(layer, some, key, value, kv_cache, rest.metadata, into, *args, **kwargs)
            output.index_copy_(0, rest.rows, into)
        elif rest is not None:
            some, into = query[rest.rows], output[rest.rows]
            self._forward(layer, some, key, value, kv_cache, rest.metadata, into, *args, **kwargs)
        return output

    def _worth(self, rows: int, keys: int) -> bool:
        if self._always:
            return keys > PRECISE_KEYS
        return worth(rows, keys, self.shape.heads, self.shape.kv_heads, self.shape.size)

    def _pieces(self, plan: PhasePlan) -> list[Piece]:
        key = ("pieces", self.shape)
        if key not in plan.memo:
            plan.memo[key] = pieces_of(plan, plan.memo["batch"], self._worth)
        return plan.memo[key]  # type: ignore[no-any-return]

    def _runs(self, plan: PhasePlan, metadata: Any, query: Tensor) -> list[Run]:
        batch = plan.memo.get("batch")
        if batch is None or metadata is None or len(query) != plan.rows:
            return []
        known = ("plain", id(metadata))  # of each group of layers that share a cache
        if known not in plan.memo:
            plan.memo[known] = is_plain(metadata, batch, plan.rows)
        if not plan.memo[known]:
            return []
        key = ("runs", self.shape)
        if key not in plan.memo:
            runs = runs_of(self._pieces(plan), batch)
            plan.memo[key] = [Run(run, query.device) for run in runs]
        return plan.memo[key]  # type: ignore[no-any-return]

    def _rest(self, plan: PhasePlan, metadata: Any) -> _Rest | None:
        key = ("rest", self.shape, id(metadata))
        if key not in plan.memo:
            plan.memo[key] = _rest(plan.memo["batch"], self._pieces(plan), metadata)
        return plan.memo[key]  # type: ignore[no-any-return]

    def room(self, rows: int, longest: int, device: torch.device) -> Room:
        """What a pass of so many rows may take at the most, allocated.

        Args:
            longest: a sequence may be, in tokens.
        """
        return Room.largest(self.shape, rows, longest, device)

    def warm_up(self, device: torch.device) -> None:
        """Has the kernels compiled before the first request waits for them."""
        of = self.shape
        page = torch.zeros(2, 16, of.kv_heads, 2 * of.size, device=device).bfloat16()
        keys, values = page.split(of.size, 3)
        table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
        query = torch.zeros(1, of.heads, of.size, dtype=torch.bfloat16, device=device)
        run = Run((Piece(0, 0, 1, PRECISE_KEYS + 1),), device)
        attend(of, run, query, keys, values, table, torch.empty_like(query))


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


def is_plain(metadata: Any, batch: Any, rows: int) -> bool:
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


def _rest(batch: Any, pieces: list[Piece], metadata: Any) -> _Rest | None:
    """The rows that are in no piece, as sequences of consecutive rows with metadata of their own."""
    taken = {piece.sequence: [] for piece in pieces}  # type: dict[int, list[Piece]]
    for piece in pieces:
        taken[piece.sequence].append(piece)
    rows: list[int] = []
    starts, lengths, sequences = [0], [], []
    row = 0
    for sequence, (first, count) in enumerate(
        zip(batch.first_positions.tolist(), batch.row_counts.tolist(), strict=True)
    ):
        at = row
        edges = [(piece.start, piece.stop) for piece in taken.get(sequence, [])]
        for start, stop in [*edges, (row + count, row + count)]:
            if at < start:
                rows.extend(range(at, start))
                starts.append(len(rows))
                lengths.append(first + start - row)
                sequences.append(sequence)
            at = stop
        row += count
    if not rows:
        return None
    device = metadata.block_table.device
    table = torch.tensor(sequences).to(device, non_blocking=True)

    theirs = copy.copy(metadata)
    theirs.num_actual_tokens = len(rows)
    theirs.query_start_loc = integers(starts, device)
    theirs.seq_lens = integers(lengths, device)
    theirs.max_query_len = max(b - a for a, b in pairwise(starts))
    theirs.max_seq_len = max(lengths)
    theirs.block_table = metadata.block_table.index_select(0, table)
    theirs.scheduler_metadata = None  # made for the whole pass
    if rows[-1] - rows[0] == len(rows) - 1:
        return _Rest(slice(rows[0], rows[-1] + 1), len(rows), theirs)
    return _Rest(torch.tensor(rows).to(device, non_blocking=True), len(rows), theirs)


def why_not(
    layer: Any, implementation: Any, dtype: torch.dtype | None, capability: tuple[int, int] | None
) -> str | None:
    """Why a layer's attention stays BF16, or None if it need not."""
    if capability != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if importlib.util.find_spec("fa3_fwd") is None:
        return "needs the package fa3-fwd"
    # Others may see parts of a sequence, or more than itself: chunks, prefixes, another's keys.
    if type(layer) is not versions.attention_layer_class():
        return f"not for vLLM's {type(layer).__name__}"
    if type(implementation).__name__ != "FlashAttentionImpl":
        return f"not for vLLM's {type(implementation).__name__}"
    if getattr(implementation, "attn_type", "decoder") != "decoder":
        return "not a decoder's attention"
    if dtype != torch.bfloat16 or implementation.kv_cache_dtype not in ("auto", "bfloat16"):
        return "needs queries and a KV cache in BF16"
    if implementation.head_size not in HEAD_SIZES:
        return f"head size {implementation.head_size}; expected one of {HEAD_SIZES}"
    if tuple(implementation.sliding_window) != (-1, -1):
        return "sliding window"
    if implementation.alibi_slopes is not None or implementation.logits_soft_cap:
        return "ALiBi or capped logits"
    if getattr(implementation, "sinks", None) is not None:
        return "attention sinks"
    if getattr(implementation, "dcp_world_size", 1) > 1:
        return "decode context parallelism"
    return None


def follow_attention(model: torch.nn.Module, recipe: Recipe) -> tuple[str, PrefillAttention | None]:
    """Makes a loaded model's attention layers multiply quantized rows in FP8, where they can.

    Returns:
        What they do, for the table, and the one of those that do whose codes take the most room.
    """
    assert isinstance(recipe.format, dict)
    quantizes = set(recipe.format.values()) != {"bf16"}
    if recipe.prefill_attention == "bf16" or (recipe.prefill_attention == "auto" and not quantizes):
        return "", None
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    if not layers:
        return "", None
    followed: list[PrefillAttention] = []
    reasons: Counter[str] = Counter()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for layer in layers:
        implementation: Any = getattr(layer, "impl", None)
        why = why_not(layer, implementation, getattr(layer, "dtype", None), capability)
        reasons[why or ""] += 1
        if why is None:
            if not isinstance(implementation.forward, PrefillAttention):
                always = recipe.prefill_attention == "fp8"
                implementation.forward = PrefillAttention(
                    implementation.forward, implementation, always
                )
            followed.append(implementation.forward)
    said = ", ".join(
        f"BF16 in {count} layers ({why})" if why else f"FP8 in {count} layers"
        for why, count in sorted(reasons.items())
    )
    return said, max(followed, key=lambda one: one.shape.heads * one.shape.size, default=None)
