"""The native FP8 call, through torch's own CPU implementation of row-wise scaled_mm.

It shows that operands, layouts and scales are what `scaled_mm` wants; the GPU's kernel itself is
tested in tests/gpu/test_gpu.py.
"""

import pytest
import torch

from mixquant.formats.base import EMULATION
from mixquant.formats.fp8 import FP8, SCALED_MM


@pytest.mark.parametrize("rows", [1, 33, 513])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_native_call_gives_the_emulated_product(rows, dtype, with_bias):
    torch.manual_seed(rows)
    # Rows and channels of very different size, so that a scale on the wrong axis shows.
    x = (torch.randn(rows, 64) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    weight = (torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None]).to(dtype)
    bias = torch.randn(48, dtype=dtype) if with_bias else None
    products = {}
    for kernel in (SCALED_MM, EMULATION):
        out = torch.full((rows, 48), torch.nan, dtype=dtype)
        FP8.linear(FP8.quantize_rows(x, kernel), FP8.quantize_weight(weight, kernel), bias, out)
        products[kernel] = out.float()
    # Both operands carry scales over four decades: compare relative to each row and channel.
    size = x.float().abs().amax(1)[:, None] * weight.float().abs().amax(1)[None] * 64**0.5
    size = size + (1 if bias is None else 1 + bias.float().abs())
    error = (products[SCALED_MM] - products[EMULATION]).abs() / size
    assert error.max() < 2**-7


def test_shapes_that_the_native_kernel_refuses_stay_precise():
    assert "multiples of 16" in str(FP8.why_not(40, 64, SCALED_MM))
    assert FP8.why_not(48, 64, SCALED_MM) is None
    assert FP8.why_not(40, 33, EMULATION) is None
