"""RMSNorm and SiLU-and-multiply that quantize what they produce, against PyTorch and the formats.

Compiled for GPUs that need not be there, and run in Triton's interpreter; with a GPU, on it. Triton is
imported in child processes, as in test_nvfp4_triton.py.
"""

import re
import sys

import pytest
import torch
from test_nvfp4_triton import (
    child,
    complete_the_interpreter,
    needs_gpu,
    needs_triton,
    rows_of_every_kind,
)
from torch import Tensor

from mixquant.formats import fp8
from mixquant.formats.base import EMULATION
from mixquant.formats.nvfp4 import NVFP4, NVFP4Rows

EPSILON = 1e-6


@needs_triton
@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_compiles_for_each_gpu(fmt: str, capability: int) -> None:
    child(__file__, "compile", str(capability), fmt)


@needs_triton
def test_the_interpreted_kernels_numbers() -> None:
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_numbers_on_a_gpu() -> None:
    child(__file__, "gpu")


def poisoned(fmt: str, rows: int, width: int, device: str):
    from mixquant.kernels.fused_triton import room_for

    room = room_for(fmt, rows, width, torch.device(device))
    for tensor in (room.codes, room.scale, room.block_scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN, in E4M3 and FP32
    return room


def check_codes(fmt: str, got, x: Tensor) -> None:
    """The codes of BF16 rows, bit by bit."""
    if fmt == "fp8":
        codes, scale = fp8.quantize(x)
        finite = scale.isfinite().flatten()
        assert torch.equal(got.scale[finite], scale[finite])
        assert torch.equal(got.codes.float()[finite], codes.float()[finite])
        assert got.scale[~finite].isfinite().logical_not().all()
    else:
        wanted = NVFP4.quantize_rows(x, EMULATION)
        torch.testing.assert_close(got.scale.flatten(), wanted.row_scale.flatten(), equal_nan=True)
        finite = wanted.row_scale.isfinite().flatten()
        assert torch.equal(got.codes[finite], wanted.codes[finite])
        blocks = got.block_scales.view(torch.uint8), wanted.block_scales.view(torch.uint8)
        assert torch.equal(blocks[0][finite], blocks[1][finite])


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


def check_silu_and_mul(fmt: str, device: str, rows: int, width: int) -> None:
    from mixquant.kernels.fused_triton import silu_and_mul

    wide = torch.full((rows, 2 * width + 16), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, : 2 * width] = torch.randn(rows, 2 * width, device=device) * 3
    x = wide[:, : 2 * width]
    got = poisoned(fmt, rows, width, device)
    silu_and_mul(x, got)
    gate, up = x.cpu().double().chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    found = dequantized(fmt, to_cpu(got)).double()
    assert (found - exact).norm() < ERROR[fmt] * exact.norm()
    # Of the same BF16 values the same codes: up to where exp, which is not rounded alike everywhere,
    # moves one to the next.
    values = (torch.nn.functional.silu(gate.float()).bfloat16() * up.bfloat16()).float()
    codes, scale = fp8.quantize(values)
    if fmt == "fp8":
        same = (to_cpu(got).scale - scale).abs() <= scale * 2**-7
        assert same.all()
        assert (to_cpu(got).codes.float() != codes.float()).float().mean() < 0.02
    else:
        wanted = NVFP4.quantize_rows(values.bfloat16(), EMULATION)
        assert (to_cpu(got).codes != wanted.codes).float().mean() < 0.02


def check_rms_norm(fmt: str | None, device: str, rows: int, width: int, with_sum: bool) -> None:
    from mixquant.kernels.fused_triton import rms_norm

    x = torch.randn(rows, width, device=device).bfloat16()
    residual = (torch.randn(rows, width, device=device) * 20).bfloat16() if with_sum else None
    weight = torch.randn(width, device=device).bfloat16()
    got = None if fmt is None else poisoned(fmt, rows, width, device)
    out, total = rms_norm(x, residual, weight, EPSILON, got)
    exact = x.cpu().double()
    if residual is not None:
        exact = exact + residual.cpu().double()
        assert torch.equal(total.cpu(), (x.cpu().float() + residual.cpu().float()).bfloat16())
    else:
        assert total is None
    exact = exact * (exact.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    exact = exact * weight.cpu().double()
    assert ((out.cpu().double() - exact).abs() <= exact.abs() * 2**-7 + 1e-30).all()
    if fmt is not None:
        check_codes(fmt, to_cpu(got), out.cpu())
        error = (dequantized(fmt, to_cpu(got)).double() - exact).norm() / exact.norm()
        assert error < ERROR[fmt]


def check(device: str) -> None:
    torch.manual_seed(0)
    cases = [(1, 64), (3, 576), (13, 96), (2, 1536)]
    cases += [(513, 4096), (300, 12288), (129, 27648)] if device == "cuda" else []
    for fmt in ("fp8", "nvfp4"):
        for rows, width in cases:
            check_silu_and_mul(fmt, device, rows, width)
            for with_sum in (False, True):
                check_rms_norm(fmt, device, rows, width, with_sum)
    check_rms_norm(None, device, 5, 96, True)
    check_extremes(device)


def check_extremes(device: str) -> None:
    """Zeros, infinity, NaN, subnormals: as the formats have them, and only in their own rows."""
    from mixquant.kernels.fused_triton import silu_and_mul

    up = rows_of_every_kind(33, 64)
    gate = torch.full_like(up, 100.0)  # silu(100) is 100
    for fmt in ("fp8", "nvfp4"):
        got = poisoned(fmt, 33, 64, device)
        silu_and_mul(torch.cat([gate, up], 1).to(device), got)
        check_codes(fmt, to_cpu(got), (up.float() * 100).bfloat16())


def main() -> None:
    if sys.argv[1] == "interpret":
        complete_the_interpreter()
        check("cpu")
    elif sys.argv[1] == "gpu":
        check("cuda")
    else:
        from mixquant.kernels.fused_triton import compile_for

        capability, fmt = int(sys.argv[2]), sys.argv[3]
        kernels = compile_for(capability, fmt)
        assert kernels.keys() == {"silu_and_mul", "rms_norm"}
        for kernel in kernels.values():
            ptx = kernel.asm["ptx"]
            assert kernel.asm["cubin"][:4] == b"\x7fELF"
            assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx), (
                "E4M3 is converted in software"
            )


if __name__ == "__main__":
    main()
