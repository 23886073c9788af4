"""RMSNorm and SiLU-and-multiply that quantize what they produce, against PyTorch and the formats.

Compiled for GPUs that need not be there, and run in Triton's interpreter; with a GPU, on it. Triton is
imported in child processes, as in tests/unit/kernels/triton/test_nvfp4.py.
"""

import re
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from triton_child import (
    child,
    complete_the_interpreter,
    needs_gpu,
    needs_triton,
    rows_of_every_kind,
)

from mixquant.formats import fp8
from mixquant.formats.base import EMULATION
from mixquant.formats.nvfp4 import NVFP4, NVFP4Rows


@pytest.mark.slow  # of each kind test_few_rows.py has one that takes less
@needs_triton
def test_compiles_for_each_gpu() -> None:
    child(__file__, "compile")


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernels_numbers() -> None:
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_numbers_on_a_gpu() -> None:
    child(__file__, "gpu")


def poisoned(fmt: str, rows: int, width: int, device: str):
    from mixquant.kernels.triton.fused import empty_codes

    room = empty_codes(fmt, rows, width, torch.device(device))
    for tensor in (room.codes, room.scale, room.block_scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN, in E4M3 and FP32
    return room


def check_codes(fmt: str, got, x: Tensor, most_different: float = 0) -> None:
    """The codes of FP32 rows, bit by bit but for a share of them."""

    def same(got: Tensor, wanted: Tensor) -> bool:
        different = got.view(torch.uint8) != wanted.view(torch.uint8)
        return bool(different.float().mean() <= most_different)

    if fmt == "fp8":
        codes, scale = fp8.quantize(x)
        finite = scale.isfinite().flatten()
        torch.testing.assert_close(got.scale[finite], scale[finite], rtol=most_different, atol=0)
        assert got.scale[~finite].isfinite().logical_not().all()
        # It multiplies with a reciprocal, which is half an ulp off: of two codes that are as near,
        # BF16 rows have many, it may take the other.
        x, codes, scale = x[finite].double(), codes[finite].double(), scale[finite].double()
        far = (got.codes[finite].double() * got.scale[finite].double() - x).abs()
        assert (far <= (codes * scale - x).abs() * (1 + 1e-4) + 1e-5 * x.abs()).all()
    else:
        wanted = NVFP4.quantize_rows(x, EMULATION, "6")
        finite = wanted.row_scale.isfinite().flatten()
        assert torch.equal(finite, got.scale.isfinite().flatten())
        assert same(got.scale[finite], wanted.row_scale[finite])
        assert same(got.codes[finite], wanted.codes[finite])
        assert same(got.block_scales[finite], wanted.block_scales[finite])


def dequantized(fmt: str, got) -> Tensor:
    if fmt == "fp8":
        return fp8.dequantize(got.codes, got.scale)
    return NVFP4.dequantize_rows(NVFP4Rows(got.codes, got.block_scales, got.scale, EMULATION))


def to_cpu(got):
    return type(got)(
        got.codes.cpu(),
        got.scale.cpu(),
        None if got.block_scales is None else got.block_scales.cpu(),
    )


ERROR = {"fp8": 0.04, "nvfp4": 0.12}


def with_precise(codes, device: str):
    """Room for every second row in BF16 as well, the last first; and which rows these are."""
    rows, width = (
        codes.scale.shape[0],
        codes.codes.shape[1] * (2 if codes.block_scales is not None else 1),
    )
    some = torch.arange(rows - 1, -1, -2)
    precise_numbers = torch.full((rows,), -1, dtype=torch.int32)
    precise_numbers[some] = torch.arange(len(some), dtype=torch.int32)
    precise = torch.full((len(some) + 1, width), torch.nan, device=device).bfloat16()
    return (
        replace(codes, precise=precise[:-1], precise_numbers=precise_numbers.to(device)),
        some,
        precise[-1],
    )


def check_silu_and_mul(fmt: str, device: str, rows: int, width: int) -> None:
    from mixquant.kernels.triton.fused import silu_and_mul

    wide = torch.full((rows, 2 * width + 16), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, : 2 * width] = torch.randn(rows, 2 * width, device=device) * 3
    x = wide[:, : 2 * width]
    got, some, beyond = with_precise(poisoned(fmt, rows, width, device), device)
    silu_and_mul(x, got)
    gate, up = x.cpu().double().chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(got.precise.cpu().double(), exact[some], rtol=2**-8, atol=1e-6)
    assert beyond.isnan().all(), "wrote beyond its rows"
    found = dequantized(fmt, to_cpu(got)).double()
    assert (found - exact).norm() < ERROR[fmt] * exact.norm()
    # The codes of the same values, but for where exp, which is not the same everywhere, moves one.
    values = (
        torch.nn.functional.silu(x.cpu().float().chunk(2, 1)[0]) * x.cpu().float().chunk(2, 1)[1]
    )
    check_codes(fmt, to_cpu(got), values, most_different=0.001)


def normalized(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """In FP64."""
    total = x.double() + (0 if residual is None else residual.double())
    return total / (total.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()


def strided(rows: int, width: int, device: str) -> Tensor:
    wide = torch.full((rows, width + 16), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, :width] = torch.randn(rows, width, device=device) * 3
    return wide[:, :width]


def check_rms_norm(fmt: str, device: str, rows: int, width: int, with_residual: bool) -> None:
    from mixquant.kernels.triton.fused import rms_norm

    x = strided(rows, width, device)
    residual = torch.randn(rows, width, device=device).bfloat16() if with_residual else None
    weight = (torch.randn(width, device=device) + 1).bfloat16()
    total = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device=device)
    got, some, beyond = with_precise(poisoned(fmt, rows, width, device), device)
    rms_norm(x, residual, weight, 1e-5, got, total if with_residual else None)
    exact = normalized(x, residual, weight, 1e-5).cpu()
    torch.testing.assert_close(got.precise.cpu().double(), exact[some], rtol=2**-8, atol=1e-6)
    assert beyond.isnan().all(), "wrote beyond its rows"
    found = dequantized(fmt, to_cpu(got)).double()
    assert (found - exact).norm() < ERROR[fmt] * exact.norm()
    check_codes(fmt, to_cpu(got), exact.float(), most_different=0.001)
    if residual is not None:
        assert torch.equal(total, x + residual)  # of BF16: added in FP32, rounded once


def check_precise_norm(device: str) -> None:
    from mixquant.kernels.triton.fused import precise_rms_norm

    for rows, width in ((0, 64), (1, 4096), (3, 100), (17, 1024)):
        x, residual = strided(rows, width, device), torch.randn(rows, width).bfloat16().to(device)
        weight = (torch.randn(width) + 1).bfloat16().to(device)
        for added in (residual, None):
            total = torch.full_like(residual, torch.nan) if added is not None else None
            got = precise_rms_norm(x, added, weight, 1e-5, total)
            wanted = normalized(x, added, weight, 1e-5)
            torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)
            if total is not None:
                assert torch.equal(total, x + residual)


def check(device: str) -> None:
    torch.manual_seed(0)
    cases = [(1, 64), (3, 576), (13, 96), (2, 1536)]
    cases += [(513, 4096), (300, 12288), (129, 27648)] if device == "cuda" else []
    for fmt in ("fp8", "nvfp4"):
        for rows, width in cases:
            check_silu_and_mul(fmt, device, rows, width)
            for with_residual in (True, False):
                check_rms_norm(fmt, device, rows, width, with_residual)
    check_extremes(device)
    check_precise(device)
    check_precise_norm(device)


def check_precise(device: str) -> None:
    from mixquant.kernels.triton.fused import precise_silu_and_mul

    for rows, width in ((0, 64), (1, 1536), (3, 100), (17, 1024)):
        x = torch.randn(rows, 2 * width + 16).bfloat16()[:, : 2 * width]
        gate, up = x.float().split(width, 1)
        got = precise_silu_and_mul(x.to(device)).cpu()
        wanted = torch.nn.functional.silu(gate) * up
        assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
        torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-6)


def check_extremes(device: str) -> None:
    """Zeros, infinity, NaN, subnormals: as the formats have them, and only in their own rows."""
    from mixquant.kernels.triton.fused import rms_norm, silu_and_mul

    up = rows_of_every_kind(33, 64)
    gate = torch.full_like(up, 100.0)  # silu(100) is 100
    for fmt in ("fp8", "nvfp4"):
        got = poisoned(fmt, 33, 64, device)
        silu_and_mul(torch.cat([gate, up], 1).to(device), got)
        check_codes(fmt, to_cpu(got), up.float() * 100)
    # A root mean square of 1 leaves what it divides.
    signs = torch.where(torch.randn(33, 64) < 0, -1.0, 1.0).bfloat16()
    zeros, ones = torch.zeros_like(signs), torch.ones(64).bfloat16()
    for bad in (torch.inf, torch.nan):
        signs[7, 3] = bad
        for fmt in ("fp8", "nvfp4"):
            got = poisoned(fmt, 33, 64, device)
            total = torch.empty_like(signs, device=device)
            rms_norm(signs.to(device), zeros.to(device), ones.to(device), 0.0, got, total)
            found = dequantized(fmt, to_cpu(got)).float()
            fine = torch.arange(33) != 7
            rtol = {"fp8": 1e-6, "nvfp4": 0.04}[fmt]
            torch.testing.assert_close(found[fine], signs[fine].float(), rtol=rtol, atol=0)
            assert not found[7].isfinite().all()


def main() -> None:
    if sys.argv[1] == "interpret":
        complete_the_interpreter()
        check("cpu")
    elif sys.argv[1] == "gpu":
        check("cuda")
    else:
        from mixquant.kernels.triton.fused import compile_for

        # In one process: importing Triton and torch takes longer than to compile a kernel.
        for case in product((90, 100, 120), ("silu_and_mul", "rms_norm"), ("fp8", "nvfp4")):
            kernel = compile_for(*case)
            assert kernel.asm["cubin"][:4] == b"\x7fELF", case
            # The hardware's own conversion.
            assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32", kernel.asm["ptx"]), case


if __name__ == "__main__":
    main()
