"""The attention kernel for CPUs against FP64: sizes, padding, context, values that drift, sinks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixquant.kernels.cpu import attention

HAS_VNNI = torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="the processor has no AVX-512 VNNI")
PRECISIONS = [
    "int8",
    pytest.param(
        "bf16",
        marks=pytest.mark.skipif(
            not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no AVX-512 BF16"
        ),
    ),
]
FIRST, BLOCK = 16, 128  # keys whose probabilities share a scale
# Relative to the result; of random values, whose attention is an average over many keys.
ERROR = {"int8": 0.016, "bf16": 0.004}


def random(sequences: int, heads: int, count: int, size: int, seed: int) -> Tensor:
    """``[B, H, N, D]`` BF16 in the layout in which models have it, ``[B, N, H, D]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, count, heads, size, generator=generator)
    return x.bfloat16().transpose(1, 2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Any,
    rows: list[tuple[int, int]] | None = None,
    padding: list[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """``[B, H, R, D]``; rows that are not computed are NaN."""
    sequences, _, count, size = q.shape
    out = torch.full_like(q, torch.nan)
    rows = rows or [(0, count)] * sequences
    padding = padding or [0] * sequences
    attention.attend(q, k, v, rows, padding, scale or size**-0.5, precision, out)
    return out


def visible(rows: int, keys: int, padding: int = 0) -> Tensor:
    at = torch.arange(keys)
    return (at <= torch.arange(keys - rows, keys)[:, None]) & (at >= padding)


def exact(q: Tensor, k: Tensor, v: Tensor, padding: int = 0, scale: float | None = None) -> Tensor:
    """Attention in FP64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], padding), -torch.inf)
    return torch.softmax(scores, -1) @ v


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm())


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4), (8, 1)])
def test_head_sizes_and_groups(precision: Any, size: int, heads: int, kv_heads: int) -> None:
    q = random(2, heads, 131, size, 0)
    k, v = (random(2, kv_heads, 131, size, seed) for seed in (1, 2))
    assert distance(exact(q, k, v), run(q, k, v, precision)) < ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 47, 48, 49, 127, 128, 129, 257])
@pytest.mark.parametrize("context", [0, 1, 15, 16, 63, 128, 300])
def test_odd_sizes_behind_a_context(precision: Any, rows: int, context: int) -> None:
    q = random(1, 3, rows, 64, 0)
    k, v = (random(1, 1, context + rows, 64, seed) for seed in (1, 2))
    assert distance(exact(q, k, v), run(q, k, v, precision)) < ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
def test_chunks_give_what_one_pass_gives(precision: Any) -> None:
    q = random(1, 4, 500, 64, 0)
    k, v = (random(1, 2, 500, 64, seed) for seed in (1, 2))
    whole = run(q, k, v, precision)
    parts = [
        run(q[:, :, a:b], k[:, :, :b], v[:, :, :b], precision)
        for a, b in ((0, 130), (130, 257), (257, 500))
    ]
    assert distance(whole, torch.cat(parts, 2)) < (0.012 if precision == "int8" else 1e-6)


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("padding", [1, 17, 128, 150])
def test_padding_and_rows_that_are_not_asked_for(precision: Any, padding: int) -> None:
    q = random(2, 2, 260, 64, 0)
    k, v = (random(2, 1, 270, 64, seed) for seed in (1, 2))
    for x in (k, v):
        x[1, :, :padding] = 1e4  # nobody may see it, nor may its size coarsen any code
    rows = [(3, 250), (padding + 5, 259)]
    out = run(q, k, v, precision, rows, [0, padding])
    for sequence, (start, stop) in enumerate(rows):
        own = slice(sequence, sequence + 1)
        wanted = exact(q[own], k[own], v[own], padding * sequence)
        assert distance(wanted[:, :, start:stop], out[own, :, start:stop]) < ERROR[precision]
        assert out[own, :, :start].isnan().all()
        assert out[own, :, stop:].isnan().all()


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sequence_without_rows_is_left_out(precision: Any) -> None:
    q = random(2, 2, 40, 64, 0)
    k, v = (random(2, 1, 40, 64, seed) for seed in (1, 2))
    out = run(q, k, v, precision, [(0, 0), (0, 40)])
    assert out[0].isnan().all()
    assert distance(exact(q[1:], k[1:], v[1:]), out[1:]) < ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mean", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("drifts", [False, True])
def test_values_with_a_mean(precision: Any, mean: float, drifts: bool) -> None:
    q = random(1, 2, 300, 64, 0)
    k, v = (random(1, 1, 3000, 64, seed) for seed in (1, 2))
    means = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)) * mean
    of = torch.arange(3000) // 1000 if drifts else torch.zeros(3000, dtype=torch.int64)
    v = (v + means[of]).bfloat16()
    assert distance(exact(q, k, v), run(q, k, v, precision)) < ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sink_at_the_first_key(precision: Any) -> None:
    # Most of the weight is on one key with small values; what the others add up to must not be lost.
    q = random(1, 2, 600, 64, 0)
    k, v = (random(1, 1, 600, 64, seed) for seed in (1, 2))
    q[..., 0] = 8.0
    k[:, :, 0] = 0.0
    k[:, :, 0, 0] = 8.5
    v[:, :, 0] *= 0.01
    weights = torch.softmax(q[0, :, -1].double() @ k[0, 0].double().T / 8, -1)
    assert 0.3 < weights[:, 0].mean() < 0.95
    assert distance(exact(q, k, v), run(q, k, v, precision)) < 1.5 * ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_scales_from_flat_to_peaked(precision: Any, scale: float) -> None:
    q = random(1, 2, 200, 64, 0)
    k, v = (random(1, 1, 200, 64, seed) for seed in (1, 2))
    out = run(q, k, v, precision, scale=scale)
    assert out.isfinite().all()
    limit = {"int8": 0.016 if scale < 1 else 0.35, "bf16": 0.02}[precision]  # errors of scores grow
    assert distance(exact(q, k, v, scale=scale), out) < limit


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_and_equal_keys(precision: Any) -> None:
    q, k = torch.zeros(1, 2, 50, 64).bfloat16(), torch.zeros(1, 1, 50, 64).bfloat16()
    v = random(1, 1, 50, 64, 0)
    assert distance(exact(q, k, v), run(q, k, v, precision)) < ERROR[precision]
    assert run(q, k, torch.zeros_like(v), precision).eq(0).all()


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("small", [1e-10, 1e-19, 1e-21, 1e-25, 1e-28, 1e-35, 0.0])
def test_small_queries_see_no_key_behind_them(precision: Any, size: int, small: float) -> None:
    q = (random(1, 2, 200, size, 0).float() * small).bfloat16()
    k, v = (random(1, 1, 200, size, seed) for seed in (1, 2))
    assert distance(exact(q, k, v), run(q, k, v, precision)) < ERROR[precision]


@needs_vnni
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("at", [0, 5, 15, 16, 60, 143, 144, 259])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_comes_through(precision: Any, size: int, at: int, where: str) -> None:
    # Hidden in codes, it would be an answer that looks like any other.
    inputs: dict[str, Any] = {
        name: random(1, 2, 260, size, seed) for seed, name in enumerate("qkv")
    }
    wanted = exact(**inputs)
    inputs[where][0, 0, at, 3] = torch.nan
    out = run(**inputs, precision=precision)
    assert distance(wanted[:, 1], out[:, 1]) < ERROR[precision]  # the other head
    lost = out[0, 0].isnan().any(-1)
    assert lost[at]
    if where == "q":
        assert lost.sum() == 1
    else:
        assert lost[at:].all()
        assert not lost[: max(at - BLOCK - 16, 0)].any()


@needs_vnni
@given(
    st.integers(0, 2**31),
    st.sampled_from([32, 64, 96, 256]),
    st.integers(1, 300),
    st.floats(0, 30),
)
@example(0, 32, 1, 7.6e-29)
@example(0, 64, 100, 1e-25)
@settings(deadline=None, max_examples=25)
def test_values_without_spread_come_back_as_they_are(
    seed: int, size: int, count: int, spread: float
) -> None:
    # Softmax's weights sum to one, in codes, too: so a mean is added back exactly.
    q, k = random(1, 2, count, size, seed) * spread, random(1, 1, count, size, seed + 1)
    v = random(1, 1, 1, size, seed + 2).expand(-1, -1, count, -1).contiguous()
    out = run(q.bfloat16(), k, v, "int8")
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out), rtol=2**-7, atol=1e-6)


def hadamard(size: int) -> Tensor:
    """The orthogonal matrix ``[size, size]`` by which the kernel rotates: blocks of a power of two."""
    width = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(width)] * (size // width))


def emulated(q: Tensor, k: Tensor, v: Tensor, rounded: bool) -> Tensor:
    """What the kernel computes in INT8, in FP64, with its roundings or without any."""

    def round_(x: Tensor) -> Tensor:
        return x.round() if rounded else x

    group, size, rows, keys = q.shape[1] // k.shape[1], q.shape[-1], q.shape[2], k.shape[2]
    q, k = (x.double() @ hadamard(size) for x in (q, k))
    q, k = (
        round_(x / (top := x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127)) * top
        for x in (q, k)
    )
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(~visible(rows, keys), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    total, weights = torch.zeros_like(q), torch.zeros(*q.shape[:3], 1, dtype=torch.float64)
    for start in (0, *range(FIRST, keys, BLOCK)):
        stop = start + (BLOCK if start else FIRST)
        some, values = scores[..., start:stop], v[:, :, start:stop]
        largest = some.amax(-1, keepdim=True).clamp_min(-1e30)
        if start == 0:  # in FP32
            p = torch.exp(some - top) * 255
            total += p @ values
            weights += p.sum(-1, keepdim=True)
            continue
        codes = round_(torch.exp(some - largest) * 255)
        mean = values.mean(2, keepdim=True)
        scale = (values - mean).abs().amax(2, keepdim=True).clamp_min(1e-30) / 127
        of_block = codes @ (round_((values - mean) / scale) * scale)
        of_block += codes.sum(-1, keepdim=True) * mean
        total += torch.exp(largest - top) * of_block
        weights += torch.exp(largest - top) * codes.sum(-1, keepdim=True)
    return total / weights


@given(
    st.integers(0, 2**31), st.sampled_from([32, 64, 96, 160]), st.integers(1, 300), st.floats(0, 5)
)
@settings(deadline=None, max_examples=25)
def test_rotation_and_means_change_nothing_without_rounding(
    seed: int, size: int, count: int, mean: float
) -> None:
    q = random(1, 2, count, size, seed)
    k, v = (random(1, 1, count, size, seed + n) + mean for n in (1, 2))
    torch.testing.assert_close(
        emulated(q, k, v, rounded=False), exact(q, k, v), rtol=1e-9, atol=1e-11
    )


@needs_vnni
@pytest.mark.parametrize("size", [64, 96])
def test_the_kernel_rounds_as_described(size: int) -> None:
    q = random(1, 2, 280, size, 0)
    k, v = (random(1, 1, 280, size, seed) for seed in (1, 2))
    k[..., 3] += 20  # an outlier, for which there is the rotation
    assert distance(emulated(q, k, v, rounded=True), run(q, k, v, "int8")) < 0.004


@needs_vnni
@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(1, 2, 8, 48).bfloat16()},
        {"q": torch.zeros(1, 2, 8, 64)},
        {"k": torch.zeros(1, 1, 7, 64).bfloat16()},
        {"rows": [(0, 9)]},
        {"rows": [(0, 8), (0, 8)]},
        {"padding": [3]},
        {"scale": -1.0},
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any]) -> None:
    x = torch.zeros(1, 1, 8, 64).bfloat16()
    given_: dict[str, Any] = {"q": torch.zeros(1, 2, 8, 64).bfloat16(), "k": x, "v": x}
    with pytest.raises(RuntimeError):
        run(**{**given_, **change}, precision="int8")


def test_without_the_instructions_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert attention.why_unavailable("int8") == "the processor has no AVX-512 VNNI"
    x = torch.zeros(1, 1, 8, 64).bfloat16()
    with pytest.raises(RuntimeError, match="no AVX-512 VNNI"):
        attention.attend(x, x, x, [(0, 8)], [0], 1.0, "int8", x)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert attention.why_unavailable("bf16") == "the processor has no AVX-512 BF16"


def test_bf16_is_left_to_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert attention.why_unavailable("bf16") == "PyTorch's is faster with AMX"


FAILS = "#!/bin/sh\necho 'attention.cpp:1:1: error: no such thing' >&2\nexit 1\n"


@needs_vnni
@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, r"there is no C\+\+ compiler .*no-compiler .Debian: g\+\+."),
        (FAILS, r"the C\+\+ compiler failed: attention.cpp:1:1: error: no such thing"),
    ],
)
def test_without_a_compiler_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compiler: str | None,
    says: str,
) -> None:
    program = tmp_path / "no-compiler"
    if compiler:
        program.write_text(compiler)
        program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    attention._why_not_loaded.cache_clear()
    try:
        for _ in range(2):
            reason = attention.why_unavailable("int8")
            assert reason is not None
            assert re.fullmatch(says, reason)
    finally:
        attention._why_not_loaded.cache_clear()
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] == [
        f"mixquant: attention stays PyTorch's, which is slower: {reason}"
    ]
    assert not list((tmp_path / "kept").rglob("*.so"))


BUILD = """
from mixquant.kernels.cpu import attention
assert attention.why_unavailable("int8") is None
print("made" if attention._library().exists() else "")
"""


@needs_vnni
def test_half_a_library_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\necho made >> "$0.calls"\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo a library > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    library = attention._library()
    assert attention._library() == library
    assert library.read_text() == "a library\n"
    library.write_text("a lib")
    assert attention._library() == library
    assert library.read_text() == "a library\n"
    assert (tmp_path / "compiler.calls").read_text() == "made\n" * 2


@needs_vnni
@pytest.mark.slow
def test_two_processes_make_one_library(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BUILD]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == ["made", "made"]
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("*.unfinished"))
