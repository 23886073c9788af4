"""FP8 codes of queries, and of keys and values out of a paged cache; and attention of such codes.

The Triton kernels run in Triton's interpreter and, with a GPU, on it, in child processes as in
test_nvfp4_triton.py; attention (the wheel fa3-fwd) needs a GPU.
"""

import importlib.util
import sys

import pytest
import torch
from test_nvfp4_triton import child, complete_the_interpreter, needs_gpu, needs_triton
from torch import Tensor

CASES = [(1, 9, 64), (513, 9, 64), (33, 3, 128), (513, 3, 256), (40, 1, 128)]  # rows, heads, size


@needs_triton
def test_the_interpreted_kernels_numbers() -> None:
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_numbers_on_a_gpu() -> None:
    child(__file__, "gpu")


def saturated(x: Tensor) -> Tensor:
    """E4M3 codes of the values as they are; what is larger becomes the largest."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn)


def same(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8).cpu(), wanted.view(torch.uint8).cpu())


def check(device: str) -> None:
    from mixquant.kernels.fp8_triton import encode, gather

    torch.manual_seed(0)
    for rows, heads, size in CASES:
        wide = torch.full((rows, heads + 1, size + 16), torch.nan, device=device).bfloat16()
        x = wide[:, :heads, :size]
        x.copy_(torch.randn(rows, heads, size) * torch.logspace(-4, 4, rows)[:, None, None])
        out = torch.full((rows, heads, size), torch.nan, device=device).to(torch.float8_e4m3fn)
        encode(x, out)
        assert same(out, saturated(x.cpu())), (rows, heads, size)

        page = 16
        pages = torch.randperm(-(-rows // page) + 3).to(torch.int32)[: -(-rows // page)]
        cache = torch.randn(len(pages) + 3, page, heads, 2 * size).bfloat16()
        tokens = cache[pages.long()].flatten(0, 1)[:rows]
        halves = slice(0, size), slice(size, None)  # keys and values side by side
        its = [torch.full((rows, heads, size), torch.nan).to(torch.float8_e4m3fn) for _ in halves]
        k, v = (one.to(device) for one in its)
        keys, values = (cache.to(device)[..., half] for half in halves)
        gather(keys, values, pages.to(device), k, v)
        for codes, half in zip((k, v), halves, strict=True):
            assert same(codes, saturated(tokens[..., half])), (rows, heads, size)


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


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (32, 8)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 700), (513, 513), (513, 2049), (300, 4096)])
def test_attention_of_codes(rows: int, keys: int, heads: int, kv_heads: int, size: int) -> None:
    if importlib.util.find_spec("fa3_fwd") is None:
        pytest.skip("needs fa3-fwd")
    from mixquant.engines.vllm.attention import flash_attention

    torch.manual_seed(rows + keys + heads + size)
    q = saturated(torch.randn(rows, heads, size, device="cuda"))
    k, v = (saturated(torch.randn(keys, kv_heads, size, device="cuda")) for _ in range(2))
    out = torch.full((1, rows, heads, size), torch.nan, dtype=torch.bfloat16, device="cuda")
    flash_attention(q[None], k[None], v[None], size**-0.5, out)
    wanted = exact_attention(q.float(), k.float(), v.float(), size**-0.5)
    # Probabilities are rounded to E4M3 before they meet the values.
    error = (out[0].double() - wanted).norm() / wanted.norm()
    assert error < 0.05
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
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 8)])
def test_attention_of_several_sequences(heads: int, kv_heads: int, size: int) -> None:
    """Each is what it is alone."""
    if importlib.util.find_spec("fa3_fwd") is None:
        pytest.skip("needs fa3-fwd")
    from mixquant.engines.vllm.attention import Piece, _bounds, flash_attention

    torch.manual_seed(heads + size)
    lengths = [(513, 513), (1, 700), (300, 4096), (77, 2049)]  # rows, keys
    run, row = [], 5
    for number, (rows, keys) in enumerate(lengths):
        run.append(Piece(number, row, row + rows, keys))
        row += rows
    bounds = _bounds(tuple(run), torch.device("cuda"))
    all_rows, all_keys = (sum(numbers) for numbers in zip(*lengths, strict=True))
    q = saturated(torch.randn(1, all_rows, heads, size, device="cuda"))
    k, v = (saturated(torch.randn(1, all_keys, kv_heads, size, device="cuda")) for _ in range(2))
    out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    flash_attention(q, k, v, size**-0.5, out, bounds)
    row = key = 0
    for rows, keys in lengths:
        its = (q[0, row : row + rows], k[0, key : key + keys], v[0, key : key + keys])
        wanted = exact_attention(*(codes.float() for codes in its), size**-0.5)
        error = (out[0, row : row + rows].double() - wanted).norm() / wanted.norm()
        assert error < 0.05, (rows, keys)
        row, key = row + rows, key + keys


def main() -> None:
    if sys.argv[1] == "interpret":
        complete_the_interpreter()
        check("cpu")
    else:
        check("cuda")


if __name__ == "__main__":
    main()
