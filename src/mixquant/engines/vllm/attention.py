"""Prefill attention in FP8, over vLLM's BF16 KV cache.

Attention is most of a long prompt's prefill. For the quantized rows of prompts that are long enough,
queries, keys and values are encoded in E4M3 on the fly and multiplied by FlashAttention-3 (the wheel
``fa3-fwd``), which writes BF16. All other rows, decode rows among them, keep vLLM's own BF16 kernel. The
cache stays as it is.

Codes have no scale, so no row depends on later tokens; and whether a row's attention is FP8 depends on
the length of its prompt and the plan alone.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixquant.engines.vllm.versions import keys_and_values
from mixquant.phase import PhasePlan, plan_in_force
from mixquant.recipe import Recipe

# In tokens. With fewer, BF16 takes no longer: encoding and more launches cost what FP8 gains.
LEAST_PROMPT = 4096

HEAD_SIZES = (64, 128, 256)

# Of sequences that are attended to at once, at the most; a longer one stands alone.
KEYS_TOGETHER = 32768


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one sequence, whose attention is FP8."""

    sequence: int
    start: int  # row of the pass
    stop: int
    keys: int  # of the last of them: its position + 1


def pieces_of(plan: PhasePlan, batch: Any, least_prompt: int = LEAST_PROMPT) -> list[Piece]:
    """The rows of a pass whose attention is FP8: quantized ones of prompts from a length on.

    Args:
        batch: with arrays ``first_positions``, ``row_counts`` and ``prompt_lengths``
            ``[sequences]``, in row order.
    """
    pieces = []
    row = 0
    for sequence, (first, count, prompt) in enumerate(
        zip(
            batch.first_positions.tolist(),
            batch.row_counts.tolist(),
            batch.prompt_lengths.tolist(),
            strict=True,
        )
    ):
        for start, stop in plan.quantized if prompt >= least_prompt else ():
            # Decode rows are quantized, too, where everything is.
            low, high = max(start, row), min(stop, row + count, row + prompt - first)
            if low < high:
                pieces.append(Piece(sequence, low, high, first + high - row))
        row += count
    return pieces


def runs_of(
    pieces: list[Piece], batch: Any, most_keys: int = KEYS_TOGETHER
) -> list[tuple[Piece, ...]]:
    """The pieces of a pass, in order, as runs of consecutive rows, each for one launch.

    Rows between two pieces (the precise tail of a sequence, the precise head of the next) count to them
    then: they are computed with the others, and again as they should be.
    """
    ends = np.cumsum(batch.row_counts).tolist()
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs and runs[-1][-1].sequence == piece.sequence - 1:
            *before, last = runs[-1]
            end = ends[last.sequence]
            last = replace(last, stop=end, keys=last.keys + end - last.stop)
            together = [*before, last, replace(piece, start=end)]
            if sum(one.keys for one in together) <= most_keys:
                runs[-1] = together
                continue
        runs.append([piece])
    return [tuple(run) for run in runs]


@dataclass(frozen=True)
class Bounds:
    """Where the sequences of a run begin and end, ``[sequences + 1]`` int32 each."""

    rows: Tensor
    keys: Tensor
    most_rows: int
    most_keys: int


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
    """

    def __init__(self, forward: Callable[..., Tensor], implementation: Any) -> None:
        self._forward = forward
        self._implementation = implementation

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
        pieces = [] if plan is None or attn_metadata is None else self._pieces(plan, attn_metadata)
        if not pieces:
            return self._forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        assert plan is not None
        keys, values = keys_and_values(kv_cache, self._implementation.head_size)
        for run, bounds in self._runs(plan, pieces, query.device):
            self._attend(run, bounds, query, keys, values, attn_metadata.block_table, output)
        # Afterwards, for it writes over rows that stand between pieces.
        rest = self._rest(plan, pieces, attn_metadata)
        if rest is not None and isinstance(rest.rows, Tensor):
            some = query.index_select(0, rest.rows)
            into = output.new_empty(rest.count, *output.shape[1:])
            self._forward(layer, some, key, value, kv_cache, rest.metadata, into, *args, **kwargs)
            output.index_copy_(0, rest.rows, into)
        elif rest is not None:
            some, into = query[rest.rows], output[rest.rows]
            self._forward(layer, some, key, value, kv_cache, rest.metadata, into, *args, **kwargs)
        return output

    def _pieces(self, plan: PhasePlan, metadata: Any) -> list[Piece]:
        if getattr(metadata, "use_cascade", False) or metadata.causal is not True:
            return []
        found: list[Piece] | None = plan.memo.get("attention")
        if found is None:
            batch = plan.memo.get("batch")
            found = [] if batch is None else pieces_of(plan, batch)
            plan.memo["attention"] = found
        return found

    def _runs(
        self, plan: PhasePlan, pieces: list[Piece], device: torch.device
    ) -> list[tuple[tuple[Piece, ...], Bounds | None]]:
        found: list[tuple[tuple[Piece, ...], Bounds | None]] | None = plan.memo.get("runs")
        if found is None:
            runs = runs_of(pieces, plan.memo["batch"])
            found = plan.memo["runs"] = [(run, _bounds(run, device)) for run in runs]
        return found

    def _rest(self, plan: PhasePlan, pieces: list[Piece], metadata: Any) -> _Rest | None:
        key = ("rest", id(metadata))  # of each group of layers that share a cache
        if key not in plan.memo:
            plan.memo[key] = _rest(plan.memo["batch"], pieces, metadata)
        return plan.memo[key]  # type: ignore[no-any-return]

    def _attend(
        self,
        run: tuple[Piece, ...],
        bounds: Bounds | None,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        output: Tensor,
    ) -> None:
        from mixquant.kernels.fp8_triton import encode, gather

        of = self._implementation
        start, stop = run[0].start, run[-1].stop
        q, k, v = self.codes(stop - start, sum(piece.keys for piece in run), query.device)
        encode(query[start:stop].view(stop - start, of.num_heads, of.head_size), q)
        at = 0
        for piece in run:
            its = slice(at, at + piece.keys)
            gather(keys, values, table[piece.sequence], k[its], v[its])
            at += piece.keys
        out = output[start:stop].view(1, stop - start, of.num_heads, of.head_size)
        flash_attention(q[None], k[None], v[None], of.scale, out, bounds)

    def warm_up(self, device: torch.device) -> None:
        """Has the kernels compiled before the first request waits for them."""
        from mixquant.kernels.fp8_triton import encode, gather

        of = self._implementation
        q, k, v = self.codes(1, 1, device)
        encode(torch.zeros(1, of.num_heads, of.head_size, dtype=torch.bfloat16, device=device), q)
        page = torch.zeros(1, 16, of.num_kv_heads, 2 * of.head_size, device=device).bfloat16()
        keys, values = page.split(of.head_size, 3)
        gather(keys, values, torch.zeros(1, dtype=torch.int32, device=device), k, v)
        out = torch.empty(1, 1, of.num_heads, of.head_size, dtype=torch.bfloat16, device=device)
        flash_attention(q[None], k[None], v[None], of.scale, out)

    def codes(self, rows: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the codes of queries, keys and values."""
        of = self._implementation
        fp8 = torch.float8_e4m3fn
        q = torch.empty(rows, of.num_heads, of.head_size, dtype=fp8, device=device)
        k = torch.empty(keys, of.num_kv_heads, of.head_size, dtype=fp8, device=device)
        return q, k, torch.empty_like(k)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    out: Tensor,
    bounds: Bounds | None = None,
) -> None:
    """Causal attention of E4M3 codes, a sequence's last query at its last key's position.

    Args:
        q: ``[1, rows, heads, size]``.
        k, v: ``[1, keys, kv_heads, size]``.
        out: ``[1, rows, heads, size]`` BF16.
        bounds: of the sequences, if there are several.
    """
    import fa3_fwd._C  # type: ignore[import-not-found]  # noqa: F401  # registers the operator

    lengths: list[Any] = [None] * 7
    if bounds is not None:
        q, k, v, out = q[0], k[0], v[0], out[0]
        lengths = [bounds.rows, bounds.keys, *[None] * 3, bounds.most_rows, bounds.most_keys]
    torch.ops.fa3_fwd.fwd(
        q,
        k,
        v,
        *[None] * 3,  # new keys and values, qv
        out,
        *lengths,
        *[None] * 3,  # pages, batch indices, padding
        *[None] * 3,  # rotary
        *[None] * 3,  # scales
        softmax_scale,
        True,  # causal
        -1,
        -1,
        0,
        0.0,
        True,
        None,
        1,
        None,
        0,
    )


def _bounds(run: tuple[Piece, ...], device: torch.device) -> Bounds | None:
    """None for a single sequence."""
    if len(run) == 1:
        return None
    rows = [piece.stop - piece.start for piece in run]
    keys = [piece.keys for piece in run]

    def sums(values: list[int]) -> Tensor:
        return _integers([0, *accumulate(values)], device)

    return Bounds(sums(rows), sums(keys), max(rows), max(keys))


def _integers(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


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
    theirs.query_start_loc = _integers(starts, device)
    theirs.seq_lens = _integers(lengths, device)
    theirs.max_query_len = max(b - a for a, b in pairwise(starts))
    theirs.max_seq_len = max(lengths)
    theirs.block_table = metadata.block_table.index_select(0, table)
    theirs.scheduler_metadata = None  # made for the whole pass
    if rows[-1] - rows[0] == len(rows) - 1:
        return _Rest(slice(rows[0], rows[-1] + 1), len(rows), theirs)
    return _Rest(torch.tensor(rows).to(device, non_blocking=True), len(rows), theirs)


def why_not(
    implementation: Any, dtype: torch.dtype | None, capability: tuple[int, int] | None
) -> str | None:
    """Why a layer's attention stays BF16, or None if it need not."""
    if capability != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if importlib.util.find_spec("fa3_fwd") is None:
        return "needs the package fa3-fwd"
    if type(implementation).__name__ != "FlashAttentionImpl":
        return f"not for vLLM's {type(implementation).__name__}"
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
        What they do, for the table, and one of those that do.
    """
    assert isinstance(recipe.format, dict)
    quantizes = set(recipe.format.values()) != {"bf16"}
    if recipe.prefill_attention == "bf16" or (recipe.prefill_attention == "auto" and not quantizes):
        return "", None
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    if not layers:
        return "", None
    followed = None
    reasons: Counter[str] = Counter()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for layer in layers:
        implementation: Any = getattr(layer, "impl", None)
        why = why_not(implementation, getattr(layer, "dtype", None), capability)
        reasons[why or ""] += 1
        if why is None:
            if not isinstance(implementation.forward, PrefillAttention):
                implementation.forward = PrefillAttention(implementation.forward, implementation)
            followed = implementation.forward
    said = ", ".join(
        f"BF16 in {count} layers ({why})" if why else f"FP8 in {count} layers"
        for why, count in sorted(reasons.items())
    )
    return said, followed
