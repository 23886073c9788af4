"""FP8 attention as serving computes it, pages and all, against attention in FP32.

Without a GPU the kernels are those of benchmarks/attention_reference.py, and sums are made with the 14
bits of Hopper's tensor cores. On Hopper the kernels are the real ones.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import attention_reference as reference
import pytest
import torch
from attention_error import (
    CASES,
    MEANS,
    SINKS,
    Inputs,
    emulated,
    errors,
    made_up,
    served,
    within_bounds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mixquant.engines.vllm.attention import rows as attention_rows
from mixquant.engines.vllm.attention.rows import (
    PRECISE_KEYS,
    UNIT,
    AttentionPiece,
    segments_of,
    stride_of,
)

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(
    not ON_HOPPER or importlib.util.find_spec("fa3_fwd") is None,
    reason="needs Hopper and fa3-fwd",
)
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="made-up tensors lie on the GPU")


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("keys", [4096, 32768, 131072])
@pytest.mark.parametrize("case", CASES)
def test_errors_are_the_codes_own(case: str, keys: int) -> None:
    for size in (64, 128, 256):
        for heads, kv_heads in ((2, 2), (8, 2), (8, 1)):
            torch.manual_seed(keys + size + heads)
            found = errors(made_up(case, [(128, keys)], heads, kv_heads, size))
            assert within_bounds(found), (size, heads, kv_heads, found)


CHUNKS = [
    [(4096, 4096)],  # a whole prompt
    [(8192, 32768)],
    [(8192, 131072)],
    [(300, 40_000)],
    [(16384, 20_000)],  # more rows than one launch takes
    [(8192, 8200)],  # behind fewer keys than are precise
    [(8192, 12_288)],
    [(2000, 2000), (5, 30), (1192, 9000), (3000, 3100)],
    [(4000, 9000), (4192, 120_000)],
]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*MEANS, *SINKS])
@pytest.mark.parametrize("sequences", CHUNKS)
def test_errors_of_chunks_and_of_several_prompts(
    sequences: list[tuple[int, int]], case: str
) -> None:
    torch.manual_seed(0)
    found = errors(made_up(case, sequences, 8, 2, 128))
    assert within_bounds(found), found


def emulated_errors(
    case: str, sequences: list[tuple[int, int]], **options: Any
) -> dict[str, float]:
    torch.manual_seed(0)
    with emulated():
        return errors(made_up(case, sequences, 2, 1, 64, **options))


@on_a_cpu
@pytest.mark.parametrize("case", CASES)
def test_emulated_errors_are_the_codes_own(case: str) -> None:
    found = emulated_errors(case, [(16, 4096)])
    assert within_bounds(found), found


@on_a_cpu
def test_emulated_errors_of_chunks_and_of_several_prompts() -> None:
    for sequences in (
        [(120, 120)],
        [(120, 125)],  # behind fewer keys than are precise
        [(100, 150)],
        [(100, 400)],
        [(100, 2500)],
        [(60, 60), (5, 30), (40, 900)],
        [(60, 60), (90, 95), (80, 100)],
    ):
        found = emulated_errors("mean 1", sequences)
        assert within_bounds(found), (sequences, found)
        # The codes are multiplied in one path, so what is wrong in it is in the ideal, too.
        assert found["error"] < 0.01, (sequences, found)


@on_a_cpu
def test_without_the_mean_sums_swallow_their_increments(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = reference.value_sums
    monkeypatch.setattr(reference, "value_sums", lambda *given: sums(*given).zero_())
    found = emulated_errors("mean 1", [(16, 4096)])
    assert not within_bounds(found) and found["error"] > 5 * found["ideal"], found


@on_a_cpu
def test_in_order_a_mean_that_changes_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = emulated_errors("1, then -1", [(4, 32768)])
    assert within_bounds(found), found
    monkeypatch.setattr(attention_rows, "stride_of", lambda units: 1)
    found = emulated_errors("1, then -1", [(4, 32768)])
    assert not within_bounds(found) and found["error"] > 5 * found["ideal"], found


@on_a_cpu
def test_rotated_outliers_err_less(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rotation = emulated_errors("mean 1, outliers in Q and K", [(16, 2048)])
    monkeypatch.setattr(reference, "rotated", lambda x: x)
    without = emulated_errors("mean 1, outliers in Q and K", [(16, 2048)])
    assert with_rotation["error"] < 0.6 * without["error"], (with_rotation, without)


@on_a_cpu
@pytest.mark.parametrize("case", SINKS)
def test_sinks_among_the_first_keys_err_less(case: str) -> None:
    first = emulated_errors(case, [(16, 2048)], sink=PRECISE_KEYS - 1)
    later = emulated_errors(case, [(16, 2048)], sink=PRECISE_KEYS)
    assert first["of_v"] < 0.004 and first["of_v"] < 0.4 * later["of_v"], (first, later)


@on_a_cpu
def test_a_later_token_changes_rounding_alone() -> None:
    torch.manual_seed(0)
    inputs = made_up("mean 1", [(64, 300)], 2, 1, 64)
    other = Inputs(inputs.q, [inputs.k[0].clone()], [inputs.v[0].clone()], inputs.scale)
    other.k[0][-1] += 3
    other.v[0][-1] += 100
    with emulated():
        (one,), (changed,) = served(inputs), served(other)
    assert (one[-1].float() - changed[-1].float()).abs().max() > 0.1
    # The mean of V moves by a third of a standard deviation, and all codes with it.
    difference = (one[:-1].float() - changed[:-1].float()).norm() / one[:-1].float().norm()
    assert difference < 0.01


# --- what is done around the product changes nothing, in exact arithmetic -----------------------------


def doubles(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.sampled_from([64, 128, 256]), st.integers(0, 99))
def test_rotation_leaves_scores_as_they_are(size: int, seed: int) -> None:
    q, k = doubles(2, 5, size, seed=seed)
    rotated = reference.rotated(q) @ reference.rotated(k).T
    assert (rotated - q @ k.T).abs().max() < 1e-12 * size
    block = reference.hadamard(min(size, 128))
    assert torch.allclose(block @ block.T, torch.eye(len(block), dtype=block.dtype), atol=1e-14)


@on_a_cpu
@pytest.mark.parametrize("case", MEANS)
def test_a_chunk_behind_little_context_attends_to_itself_in_bf16(case: str) -> None:
    whole = emulated_errors(case, [(300, 300)])
    assert whole["error"] < 0.003, whole  # BF16's own
    # Half of the keys that these rows see have codes, and all keys of the first ones.
    assert emulated_errors(case, [(300, 500)])["of_v"] < 0.01


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 99))
def test_means_and_segments_leave_attention_as_it_is(keys: int, rows: int, seed: int) -> None:
    scores, values = doubles(3, keys, seed=seed), doubles(keys, 8, seed=seed + 1)
    piece = AttentionPiece(0, 0, min(rows, keys), keys)
    segments = segments_of(piece)
    ends = [
        (0, min(piece.context, PRECISE_KEYS)),
        *((one.first, one.first + one.count) for one in segments),
        *([(piece.context, keys)] if piece.own_in_bf16 else []),
    ]
    parts, sums = [], []
    for start, stop in ends:
        if start == stop:
            continue
        mean = values[start:stop].mean(0)
        weights = scores[:, start:stop].softmax(-1)
        parts.append(weights @ (values[start:stop] - mean) + mean)
        sums.append(scores[:, start:stop].logsumexp(-1))
    joined = (torch.stack(sums).softmax(0)[..., None] * torch.stack(parts)).sum(0)
    assert (joined - scores.softmax(-1) @ values).abs().max() < 1e-12


@settings(deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 9000))
def test_segments_cover_the_keys(keys: int, rows: int) -> None:
    rows = min(rows, keys)
    piece = AttentionPiece(0, 0, rows, keys)
    context, chunk = segments_of(piece)
    # All rows see the whole context.
    assert context.count == max(0, keys - rows - PRECISE_KEYS) and context.first == PRECISE_KEYS
    assert chunk.first == keys - rows and chunk.stride == 1
    assert chunk.count == (0 if piece.own_in_bf16 else rows)
    assert piece.own_in_bf16 == (keys < 2 * rows or keys - rows < PRECISE_KEYS)


@settings(deadline=None)
@given(st.integers(0, 3000))
def test_an_order_holds_each_unit_once_and_is_even(units: int) -> None:
    stride = stride_of(units)
    order = [number * stride % units for number in range(units)]
    assert sorted(order) == list(range(units))
    # Of any 64 in a row, a half of the units has about a half.
    for start in range(0, units - 64, 97):
        low = sum(unit < units // 2 for unit in order[start : start + 64])
        assert abs(low - 32) <= 6


def test_the_order_leaves_what_is_no_whole_unit_at_the_end() -> None:
    keys = torch.arange(100)[:, None, None]
    pages = torch.arange(7, dtype=torch.int32)[None]
    cache = torch.cat([keys, torch.zeros(12, 1, 1, dtype=keys.dtype)]).view(7, 16, 1, 1)
    found = reference.tokens_of(cache, pages, 0, 10, 85, 3).flatten().tolist()
    assert sorted(found) == list(range(10, 95)) and found[80:] == list(range(90, 95))
    assert found[:UNIT] == list(range(10, 26)) and found[UNIT] == 10 + 3 * UNIT
