"""FP8 prefill attention in vLLM: which rows, and what they attend to. The kernels: tests/gpu."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_engines import require_vllm

require_vllm()

from mixquant.core.phase import (  # noqa: E402
    Thresholds,
    everything_quantized,
    in_force,
    plan_pass,
)
from mixquant.engines.vllm.attention import layers as attention  # noqa: E402
from mixquant.engines.vllm.attention.fp8 import Run, Shape  # noqa: E402
from mixquant.engines.vllm.attention.layers import PrefillAttention, is_plain  # noqa: E402
from mixquant.engines.vllm.attention.rows import pieces_of, runs_of, worth  # noqa: E402
from mixquant.engines.vllm.context import Batch, state_of  # noqa: E402

HEADS, KV_HEADS, SIZE, PAGE = 6, 2, 16, 4
SCALE = 0.3


def batch_of(sequences: list[tuple[int, int, int]]) -> Batch:
    """From (first position, rows, prompt length) of each."""
    first, rows, prompt = (
        np.array(column, dtype=np.int64) for column in zip(*sequences, strict=True)
    )
    return Batch([str(n) for n in range(len(first))], first, rows, prompt)


def plan_of(batch: Batch, thresholds: Thresholds) -> Any:
    plan = plan_pass(thresholds, batch.first_positions, batch.row_counts, batch.prompt_lengths)
    state_of(plan).batch = batch
    return plan


@st.composite
def batches(draw: Any) -> Batch:
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        first, rows = draw(st.integers(0, 30)), draw(st.integers(1, 20))
        sequences.append((first, rows, draw(st.integers(1, 60))))
    return batch_of(sequences)


thresholds = st.builds(
    Thresholds,
    min_prefill_tokens=st.integers(0, 10),
    precise_head=st.integers(0, 8),
    precise_tail=st.integers(0, 8),
)


@settings(deadline=None)
@given(batches(), thresholds, st.integers(0, 40))
def test_pieces_are_the_quantized_rows_that_are_worth_it(
    batch: Batch, numbers: Thresholds, least: int
) -> None:
    plan = plan_of(batch, numbers)
    asked = []

    def worth_it(rows: int, keys: int) -> bool:
        asked.append((rows, keys))
        return keys >= least

    found = {}
    for piece in pieces_of(plan, batch, worth_it):
        assert (piece.rows, piece.keys) in asked or piece.context == 0
        for row in range(piece.start, piece.stop):
            found[row] = (piece.sequence, piece.keys - (piece.stop - row) + 1)
    expected: dict[int, tuple[int, int]] = {}
    row = 0
    for sequence, (first, count, prompt) in enumerate(
        zip(batch.first_positions, batch.row_counts, batch.prompt_lengths, strict=True)
    ):
        its = [
            (row + n, first + n)
            for n in range(count)
            if first + n < prompt and any(start <= row + n < stop for start, stop in plan.quantized)
        ]
        if its and its[-1][1] + 1 >= least:
            if first == 0:  # all of it, in BF16
                its = [(row + n, n) for n in range(count)]
            expected |= {at: (sequence, position + 1) for at, position in its}
        row += count
    assert found == expected


@settings(deadline=None)
@given(batches(), thresholds, st.integers(1, 8), st.integers(0, 120))
def test_runs_are_pieces_of_sequences_that_follow_each_other(
    batch: Batch, numbers: Thresholds, max_rows: int, most: int
) -> None:
    pieces = pieces_of(plan_of(batch, numbers), batch, lambda rows, keys: keys > 5)
    runs = runs_of(pieces, batch, max_rows, most)
    ends = np.cumsum(batch.row_counts)
    of_pieces = {
        row: (p.sequence, p.keys - p.stop) for p in pieces for row in range(p.start, p.stop)
    }
    rows = []
    for run in runs:
        assert len(run) == 1 or sum(piece.keys for piece in run) <= most
        for piece, following in pairwise(run):
            assert piece.stop == following.start == ends[piece.sequence]
            assert following.sequence == piece.sequence + 1
        for piece in run:
            assert len(run) > 1 or piece.stop - piece.start <= max_rows
            for row in range(piece.start, piece.stop):
                # Positions are as they were; others' rows stand between pieces.
                if of_pieces.get(row, (piece.sequence,))[0] == piece.sequence:
                    rows.append(row)
                    assert of_pieces.get(row, (0, piece.keys - piece.stop))[1] == (
                        piece.keys - piece.stop
                    )
    assert set(of_pieces) <= set(rows) and rows == sorted(set(rows))


def test_where_everything_is_quantized_generated_tokens_attend_in_bf16() -> None:
    batch = batch_of([(10, 20, 25), (40, 1, 30), (5, 4, 9)])
    pieces = pieces_of(everything_quantized(25), batch, lambda rows, keys: True)
    assert [(one.sequence, one.start, one.stop, one.keys) for one in pieces] == [
        (0, 0, 15, 25),  # five generated tokens follow
        (2, 21, 25, 9),
    ]


def test_where_fp8_is_asked_for_every_row_attends_in_it() -> None:
    implementation = SimpleNamespace(num_heads=8, num_kv_heads=2, head_size=128, scale=0.1)
    nothing: Any = len
    always, auto = (PrefillAttention(nothing, implementation, one) for one in (True, False))
    assert WORTH(always, 1, 17) and not WORTH(auto, 1, 17) and WORTH(auto, 8192, 131_072)


def test_fp8_is_worth_it_by_work() -> None:
    """As benchmarks/attention_crossover.py measured it on an H100, of 32 heads over 8."""
    for rows, keys, wanted in [
        (128, 100_000, False),
        (512, 2048, False),
        (512, 100_000, False),
        (2048, 2048, False),
        (2048, 100_000, True),
        (8192, 8192, True),  # none before them
        (8192, 10_240, False),  # what is saved is as much as codes take
        (8192, 12_288, True),
        (4096, 4096, False),
        (8192, 16_384, True),
        (8192, 131_072, True),
    ]:
        assert worth(rows, keys, 32, 8, 128) is wanted, (rows, keys)
    # The more queries share a key, the sooner.
    assert worth(1024, 25_000, 64, 4, 128) and not worth(1024, 25_000, 8, 8, 128)


# --- against attention row by row ---------------------------------------------------------------------


@dataclass
class Metadata:
    """What vLLM's FlashAttention backend says about a pass, as far as it matters here."""

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int
    block_table: Tensor
    scheduler_metadata: Any = "of the whole pass"
    use_cascade: bool = False
    causal: Any = True


class Implementation:
    """vLLM's: BF16 attention over pages, and a record of the rows that it was asked for."""

    num_heads, num_kv_heads, head_size, scale = HEADS, KV_HEADS, SIZE, SCALE

    def __init__(self) -> None:
        self.asked: list[Metadata] = []

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Metadata,
        output: Tensor,
    ) -> Tensor:
        if metadata is None:
            return output.fill_(0)
        self.asked.append(metadata)
        keys, values = attention.versions.keys_and_values(kv_cache, SIZE)
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        assert starts[-1] == metadata.num_actual_tokens
        assert metadata.max_seq_len >= max(lengths)
        for n, length in enumerate(lengths):
            rows = range(starts[n], starts[n + 1])
            assert len(rows) <= metadata.max_query_len
            positions = torch.arange(length)
            pages = metadata.block_table[n][positions // PAGE].long()
            k, v = keys[pages, positions % PAGE], values[pages, positions % PAGE]
            for row in rows:
                end = length - (rows.stop - 1 - row)
                output[row] = attend(query[row], k[:end], v[:end])
        return output


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One row ``[HEADS, SIZE]`` over ``[keys, KV_HEADS, SIZE]``, in FP32."""
    of = HEADS // KV_HEADS
    k, v = (t.float().repeat_interleave(of, dim=1) for t in (keys, values))
    weights = (torch.einsum("hd,khd->hk", query.float(), k) * SCALE).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v).to(torch.bfloat16)


def rounded(x: Tensor) -> Tensor:
    """To E4M3's numbers."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)


LEAST_KEYS = 6
WORTH = PrefillAttention._worth  # which the tests replace


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for FP8 attention, which takes the same arguments; its numbers: test_fp8_attention."""

    def attend_in_fp8(
        shape: Shape,
        run: Run,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: tuple[Tensor, Tensor],
        table: Tensor,
        output: Tensor,
    ) -> None:
        assert key is value is query  # as the tests give them
        assert (shape.heads, shape.kv_heads, shape.size, shape.scale) == (
            *(HEADS, KV_HEADS, SIZE),
            SCALE,
        )
        for sequence, start, count, until in run.sequences.tolist():
            positions = torch.arange(until)
            pages = table[sequence][positions // PAGE].long()
            k, v = (rounded(of[pages, positions % PAGE]) for of in cache)
            for row in range(count):
                end = until - count + row + 1
                at = run.start + start + row
                output[at] = attend(rounded(query[at]), k[:end], v[:end])

    monkeypatch.setattr(attention, "attend", attend_in_fp8)
    monkeypatch.setattr(PrefillAttention, "_worth", lambda self, rows, keys: keys >= LEAST_KEYS)
    runs = attention.runs_of
    monkeypatch.setattr(attention, "runs_of", lambda pieces, batch: runs(pieces, batch, 7, 60))


def pass_of(batch: Batch, layout: str, seed: int) -> tuple[Tensor, Tensor, Metadata]:
    """Queries ``[rows, HEADS, SIZE]``, a cache with pages in disorder, and the metadata."""
    make = torch.Generator().manual_seed(seed)
    rows, lengths = int(batch.row_counts.sum()), batch.first_positions + batch.row_counts
    width = -(-int(lengths.max()) // PAGE)
    table = torch.randperm(len(lengths) * width + 3, generator=make)[: len(lengths) * width]
    shape = {
        "0.25": (len(lengths) * width + 3, 2, PAGE, KV_HEADS, SIZE),
        "0.26": (len(lengths) * width + 3, KV_HEADS, PAGE, 2 * SIZE),
    }[layout]
    cache = torch.randn(shape, generator=make).to(torch.bfloat16)
    query = torch.randn(rows, HEADS, SIZE, generator=make).to(torch.bfloat16)
    starts = np.concatenate([[0], np.cumsum(batch.row_counts)])
    metadata = Metadata(
        rows,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        int(batch.row_counts.max()),
        int(lengths.max()),
        table.view(len(lengths), width).to(torch.int32),
    )
    return query, cache, metadata


@settings(deadline=None)
@given(batches(), thresholds, st.sampled_from(["0.25", "0.26"]), st.integers(0, 9))
def test_each_row_attends_in_its_precision(
    batch: Batch, numbers: Thresholds, layout: str, seed: int
) -> None:
    query, cache, metadata = pass_of(batch, layout, seed)
    plan = plan_of(batch, numbers)
    implementation = Implementation()
    ours = PrefillAttention(implementation.forward, implementation, False)
    output = torch.full_like(query, float("nan"))
    with in_force(plan):
        for _ in range(2):  # as two layers do, which share the plan
            assert ours(None, query, query, query, cache, metadata, output) is output

    reference = Implementation()
    precise = reference.forward(None, query, query, query, cache, metadata, torch.empty_like(query))
    keys, values = attention.versions.keys_and_values(cache, SIZE)
    quantized = reference.forward(
        None,
        rounded(query),
        query,
        query,
        torch.stack([rounded(keys), rounded(values)], dim=1),
        metadata,
        torch.empty_like(query),
    )
    pieces = pieces_of(plan, batch, lambda rows, keys: keys >= LEAST_KEYS)
    in_fp8 = {row for piece in pieces for row in range(piece.start, piece.stop)}
    for row in range(len(query)):
        assert torch.equal(output[row], (quantized if row in in_fp8 else precise)[row]), row
    rest = len(query) - len(in_fp8)
    assert [one.num_actual_tokens for one in implementation.asked] == [rest] * (2 if rest else 0)
    assert all((one.scheduler_metadata is None) == bool(in_fp8) for one in implementation.asked)
    assert metadata.num_actual_tokens == len(query)


STRANGE: dict[str, Any] = {
    "cascade": {"use_cascade": True},
    "per-sequence causal": {"causal": torch.ones(1)},
    "not causal": {"causal": False},
    "sliding window": {"sliding_window": (15, 0)},
    "ranges that see each other": {"mm_prefix_query_range_tensor": torch.zeros(20, 2)},
    "window after a prefix": {"rswa_window": 64},
    "virtual batches": {"make_virtual_batches_block_table": lambda table: table},
    "fewer rows, for sharing keys": {"logits_indices_padded": torch.zeros(1)},
    "something new": {"something_new": "on"},
    "another pass's rows": {"num_actual_tokens": 19},
    "more sequences": {"block_table": torch.zeros(2, 5, dtype=torch.int32)},
    "more lengths": {"query_start_loc": torch.tensor([0, 10, 20], dtype=torch.int32)},
}


OTHER = ["no plan", "no metadata", "no batch", "fewer queries", "no keys", "fewer keys"]


@pytest.mark.parametrize("case", [*OTHER, *STRANGE])
def test_everything_else_is_vllms_own(case: str) -> None:
    batch = batch_of([(0, 20, 20)])
    query, cache, metadata = pass_of(batch, "0.26", 0)
    plan = plan_of(batch, Thresholds())
    given: Any = metadata
    if case == "no plan":
        plan = None
    elif case == "no metadata":
        given = None
    elif case == "no batch":
        state_of(plan).batch = None
    elif case == "fewer queries":
        query = query[:5]  # as of layers that share another's keys, where only last rows are wanted
    key = {"no keys": None, "fewer keys": query[:5]}.get(case, query)
    for name, value in STRANGE.get(case, {}).items():
        setattr(metadata, name, value)
    asked = []
    implementation = Implementation()

    def forward(*arguments: Any) -> Tensor:
        asked.append(arguments)
        return arguments[6]

    ours = PrefillAttention(forward, implementation, False)
    output = torch.empty_like(query)
    with in_force(plan):
        assert ours(None, query, key, key, cache, given, output) is output  # type: ignore[arg-type]
    (arguments,) = asked
    assert arguments[1] is query and arguments[5] is given


def test_plain_metadata_may_say_what_changes_nothing() -> None:
    batch = batch_of([(0, 20, 20)])
    _, _, metadata = pass_of(batch, "0.26", 0)
    for name, value in [
        *[("sliding_window", (-1, -1)), ("max_dcp_context_kv_len", 0), ("rswa_window", None)],
        *[("use_cascade", False), ("num_decode_reqs", 0), ("max_num_splits", 4)],
    ]:
        setattr(metadata, name, value)
    assert is_plain(metadata, batch, 20)
    metadata.num_actual_tokens = 24  # with padding
    assert is_plain(metadata, batch, 24) and not is_plain(metadata, batch, 23)
