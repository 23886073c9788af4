"""The kernels around FP8 attention: codes, means and the merge, against PyTorch; and fa3-fwd's product.

The Triton kernels run in Triton's interpreter and, with a GPU, on it, in child processes as in
tests/unit/kernels/triton/test_nvfp4.py; attention (the wheel fa3-fwd) needs a GPU.
"""

import importlib.util
import re
import sys
from itertools import accumulate
from typing import Any

import attention_reference as reference
import pytest
import torch
from torch import Tensor
from triton_child import child, complete_the_interpreter, needs_gpu, needs_triton

SHAPES = [(9, 3, 64), (2, 2, 128), (4, 1, 256)]  # heads, of keys and values, size
PAGE = 16


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernels_numbers() -> None:
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_numbers_on_a_gpu() -> None:
    child(__file__, "gpu")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("size", [64, 128, 256])
def test_compiles_for_hopper(size: int) -> None:
    child(__file__, "compile", str(size))


def close(got: Tensor, wanted: Tensor) -> bool:
    """Codes may differ by one where sums in another order fall beside the middle of two."""
    got, wanted = got.cpu().float(), wanted.cpu().float()
    different = got != wanted
    one = (got - wanted).abs() <= torch.maximum(wanted.abs() * 2**-3, torch.tensor(2**-9))
    return bool(one.all()) and different.float().mean().item() < 2e-3


def cache_of(
    sequences: int, most: int, kv_heads: int, size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and a block table: pages in disorder, and NaN in those of no sequence."""
    from mixquant.engines.vllm.versions import keys_and_values

    width = -(-most // PAGE)
    pages = sequences * width + 3
    shape = {"0.25": (pages, 2, PAGE, kv_heads, size), "0.26": (pages, kv_heads, PAGE, 2 * size)}
    table = torch.randperm(pages)[: sequences * width].view(sequences, width).to(torch.int32)
    cache = torch.full(shape[layout], torch.nan).bfloat16()
    cache[table.flatten().long()] = torch.randn(sequences * width, *shape[layout][1:]).bfloat16()
    keys, values = keys_and_values(cache, size)
    values += 1  # their mean
    return keys, values, table


def check(device: str) -> None:
    from mixquant.kernels.triton import fp8_attention as kernels

    if device == "cpu":
        kernels.SPANS = 4  # programs take the interpreter long
    torch.manual_seed(0)
    for heads, kv_heads, size in SHAPES:
        for layout in ("0.25", "0.26") if size == 64 else ("0.26",):
            keys, values, table = cache_of(3, 700, kv_heads, size, layout)
            # Row of the table, first key, how many, where the codes begin, stride.
            rows = [(2, 16, 300, 0, 11), (2, 316, 384, 300, 1), (0, 16, 0, 684, 1)]
            rows += [(1, 16, 78, 684, 3)]
            segments = torch.tensor(rows, dtype=torch.int32)
            there: list[Any] = [x.to(device) for x in (keys, values, table, segments)]
            wanted_sums = reference.value_sums(values, table, segments)
            sums = kernels.value_sums(*there[1:])
            torch.testing.assert_close(sums.sum(1).cpu(), wanted_sums[:, 0], rtol=1e-5, atol=1e-3)

            codes = torch.full((4, 762, kv_heads, size), torch.nan).to(torch.float8_e4m3fn)
            wanted_lost = reference.encode_cache(
                keys, values, table, segments, wanted_sums, codes[0], codes[1], 16
            )
            k, v = codes[2].to(device), codes[3].to(device)
            lost = kernels.encode_cache(*there, sums, k, v, 16)  # type: ignore[call-arg]
            assert close(k, codes[0]) and close(v, codes[1]), (layout, size)
            torch.testing.assert_close(lost.cpu(), wanted_lost, rtol=1e-3, atol=0.5)

            check_rows(kernels, device, heads, keys, values, table)


def check_rows(
    kernels: Any, device: str, heads: int, keys: Tensor, values: Tensor, table: Tensor
) -> None:
    """The codes of queries, their attention to the first keys, and the merge with that to others."""
    kv_heads, size = keys.shape[2:]
    runs = {
        # One sequence behind fewer keys than are precise.
        "prompt": ([(2, 0, 130, 140)], [(2, 16, 114, 0, 1)]),
        "context and chunk": ([(2, 0, 130, 330)], [(2, 16, 184, 0, 7), (2, 200, 130, 184, 1)]),
        "several": (
            [(0, 0, 3, 700), (1, 3, 70, 70), (2, 73, 57, 90)],  # the second begins its prompt
            [
                *[(0, 16, 681, 0, 26), (1, 16, 0, 681, 1), (2, 16, 17, 681, 1)],
                *[(0, 697, 3, 698, 1), (1, 16, 54, 701, 1), (2, 33, 57, 755, 1)],
            ],
        ),
    }
    for sequences, segments in runs.values():
        tokens, parts = 130, len(segments) // len(sequences)
        wide = torch.full((tokens, heads * size + 16), torch.nan).bfloat16()
        x = wide[:, : heads * size].view(tokens, heads, size)
        x.copy_(torch.randn(tokens, heads, size) * torch.logspace(-3, 1, tokens)[:, None, None])
        x[7] *= 1e4  # more than the largest code
        of_sequences, of_segments = (
            torch.tensor(one, dtype=torch.int32) for one in (sequences, segments)
        )
        most = max(rows for _, _, rows, _ in sequences)
        codes = torch.full((2, *x.shape), torch.nan).to(torch.float8_e4m3fn)
        of_rows = (keys, table, of_sequences)
        wanted = reference.encode_queries(x, *of_rows, most, size**-0.5, codes[0], 16)
        there = wide.to(device)[:, : heads * size].view(x.shape)
        got_codes = codes[1].to(device)
        of_rows = tuple(one.to(device) for one in of_rows)
        got = kernels.encode_queries(there, *of_rows, most, size**-0.5, got_codes, 16)
        assert close(got_codes, codes[0]), (heads, size)
        torch.testing.assert_close(got[0].cpu().float(), wanted[0], rtol=0.02, atol=0.01)
        torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=1e-3, atol=1e-3)

        partial = torch.randn(parts, tokens, heads, size).bfloat16()
        lse = torch.randn(parts, heads, tokens) * 3
        # Rows that see first keys, and no segment, where nothing may be read.
        lse[:, :, :3] = -torch.inf
        partial[:, :3] = torch.nan
        lost = torch.randn(len(segments), kv_heads, size) * 50
        joined = torch.empty(tokens, heads, size)
        its = (table, of_sequences, most, *wanted, of_segments, lost)
        reference.merge(values, *its, partial.nan_to_num(), lse, joined)
        its = (table, of_sequences, most, *got, of_segments, lost)
        on_device = [one.to(device) if isinstance(one, Tensor) else one for one in its]
        partial, lse = partial.to(device), lse.to(device)
        out = torch.full((tokens, heads, size), torch.nan, device=device).bfloat16()
        for into in (out, partial[0]) if parts == 1 else (out,):  # also in place
            kernels.merge(values.to(device), *on_device, partial, lse, into)
            torch.testing.assert_close(into.cpu().float(), joined, rtol=0.02, atol=0.02)


def compiled(size: int) -> None:
    """The kernels' machine code for Hopper: rotations and merges are the tensor cores' there."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mixquant.kernels.triton import fp8_attention as kernels

    pointers = {
        **dict.fromkeys(("x", "keys", "values", "partial", "weights"), "*bf16"),
        **dict.fromkeys(("k", "v"), "*fp8e4nv"),
        **dict.fromkeys(("pages", "segments", "sequences"), "*i32"),
        **dict.fromkeys(("sums", "lost", "lse", "first_lse"), "*fp32"),
        "scale": "fp32",
    }
    constants = {"SIZE": size, "ROTATED": min(size, 128), "TOKENS": 64, "SPANS": 64}
    constants |= {"PRECISE": 16, "UNIT": 16, "TIMES": 8}
    for name in ("encode_queries", "value_sums", "encode_cache", "merge"):
        kernel = getattr(kernels, f"{name}_kernel")
        kinds = dict(pointers)
        kinds["out"] = "*fp8e4nv" if name == "encode_queries" else "*bf16"
        signature, fixed = {}, {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument], fixed[(kernel.arg_names.index(argument),)] = (
                    "constexpr",
                    constants[argument],
                )
            else:
                signature[argument] = kinds.get(argument, "i32")
        source = triton.compiler.ASTSource(kernel, signature, fixed)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        multiplies = re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None
        assert multiplies == (name != "value_sums"), name


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal, the last query at the last key; ``[rows, heads, size]`` FP64."""
    rows, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    k, v = (tensor.repeat_interleave(heads // kv_heads, 1).double() for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    later = torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(later.to(q.device), -torch.inf).softmax(-1), v
    )


def saturated(x: Tensor) -> Tensor:
    """E4M3 codes of the values as they are; what is larger becomes the largest."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (32, 8)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 700), (513, 513), (513, 2049), (300, 4096)])
@pytest.mark.parametrize("as_codes", [True, False])
def test_attention_of_codes_and_of_bf16(
    as_codes: bool, rows: int, keys: int, heads: int, kv_heads: int, size: int
) -> None:
    if importlib.util.find_spec("fa3_fwd") is None:
        pytest.skip("needs fa3-fwd")
    from mixquant.engines.vllm.attention.fp8 import flash_attention

    torch.manual_seed(rows + keys + heads + size)
    made = saturated if as_codes else torch.Tensor.bfloat16
    q = made(torch.randn(rows, heads, size, device="cuda"))
    # As a layer makes them of one product: their rows do not follow each other.
    k, v = made(torch.randn(keys, kv_heads, 2 * size, device="cuda")).split(size, -1)
    out = torch.full((1, rows, heads, size), torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = flash_attention(q[None], k[None], v[None], size**-0.5, out)
    wanted = exact_attention(q.float(), k.float(), v.float(), size**-0.5)
    # Probabilities are rounded before they meet the values, to E4M3 or BF16.
    error = (out[0].double() - wanted).norm() / wanted.norm()
    assert error < (0.05 if as_codes else 0.005)
    sums = torch.full_like(out, torch.nan)
    of_sums = reference.summed_exactly(q[None], k[None], v[None], size**-0.5, sums)
    torch.testing.assert_close(lse, of_sums, rtol=1e-3, atol=1e-3)
    # Without a mask, and in segments, joined: the same.
    if rows == 1 and keys > 1:
        torch.testing.assert_close(
            flash_attention(q[None], k[None], v[None], size**-0.5, out, causal=False), lse
        )
    # A row's attention is the same whoever stands beside it.
    if rows > 1:
        alone = torch.full((1, 1, heads, size), torch.nan, dtype=torch.bfloat16, device="cuda")
        row = rows // 2
        until = keys - rows + row + 1
        flash_attention(q[None, row : row + 1], k[None, :until], v[None, :until], size**-0.5, alone)
        torch.testing.assert_close(alone[0, 0], out[0, row], rtol=0.05, atol=0.02)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_rows_before_the_first_key_see_nothing(size: int) -> None:
    if importlib.util.find_spec("fa3_fwd") is None:
        pytest.skip("needs fa3-fwd")
    from mixquant.engines.vllm.attention.fp8 import flash_attention

    for rows, keys in ((400, 384), (400, 10), (17, 1)):
        q = saturated(torch.randn(1, rows, 4, size, device="cuda"))
        k, v = (saturated(torch.randn(1, keys, 4, size, device="cuda")) for _ in range(2))
        out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        lse = flash_attention(q, k, v, size**-0.5, out)
        assert lse[..., : rows - keys].eq(-torch.inf).all()
        assert lse[..., rows - keys :].isfinite().all()
        assert out[:, rows - keys :].isfinite().all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 8)])
@pytest.mark.parametrize("as_codes", [True, False])
def test_attention_of_several_sequences(
    as_codes: bool, heads: int, kv_heads: int, size: int
) -> None:
    """Each is what it is alone."""
    if importlib.util.find_spec("fa3_fwd") is None:
        pytest.skip("needs fa3-fwd")
    from mixquant.engines.vllm.attention.fp8 import Bounds, flash_attention, integers

    torch.manual_seed(heads + size)
    lengths = [(513, 513), (1, 700), (300, 4096), (5, 0), (77, 2049)]  # rows, keys
    ends = [[0, *accumulate(counts)] for counts in zip(*lengths, strict=True)]
    rows_at, keys_at = (integers(one, torch.device("cuda")) for one in ends)
    bounds = Bounds(rows_at, keys_at, 513, 4096)
    all_rows, all_keys = (sum(numbers) for numbers in zip(*lengths, strict=True))
    made = saturated if as_codes else torch.Tensor.bfloat16
    q = made(torch.randn(1, all_rows, heads, size, device="cuda"))
    k, v = (made(torch.randn(1, all_keys, kv_heads, size, device="cuda")) for _ in range(2))
    out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = flash_attention(q, k, v, size**-0.5, out, bounds=bounds)
    sums = torch.full_like(out, torch.nan)
    of_sums = reference.summed_exactly(q, k, v, size**-0.5, sums, bounds=bounds)
    torch.testing.assert_close(lse, of_sums, rtol=1e-3, atol=1e-3)
    row = key = 0
    for rows, keys in lengths:
        if not keys:
            assert lse[:, row : row + rows].eq(-torch.inf).all()
            row += rows
            continue
        its = (q[0, row : row + rows], k[0, key : key + keys], v[0, key : key + keys])
        wanted = exact_attention(its[0].float(), its[1].float(), its[2].float(), size**-0.5)
        error = (out[0, row : row + rows].double() - wanted).norm() / wanted.norm()
        assert error < (0.05 if as_codes else 0.005), (rows, keys)
        row, key = row + rows, key + keys


def main() -> None:
    if sys.argv[1] == "interpret":
        complete_the_interpreter()
        check("cpu")
    elif sys.argv[1] == "compile":
        compiled(int(sys.argv[2]))
    else:
        check("cuda")


if __name__ == "__main__":
    main()
