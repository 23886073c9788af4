"""Inputs of the tests of NVFP4, and a comparison bit by bit."""

from __future__ import annotations

import torch
from example_counts import up_to
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mixquant.formats import nvfp4_blocks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALES: list[nvfp4_blocks.BlockScale] = ["6", "4/6"]
INF = float("inf")
NAN = float("nan")
some = settings(deadline=None, max_examples=up_to(60))
seeds = st.integers(0, 2**31 - 1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rough(*shape: int, seed: int = 0) -> Tensor:
    """Blocks of very different magnitudes (2**-12 to 2**12)."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 13, (*shape[:-1], shape[-1] // 16), generator=generator)
    return torch.randn(*shape, generator=generator) * (2.0**exponents).repeat_interleave(16, -1)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


def outlier(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 5] = value
    return x
