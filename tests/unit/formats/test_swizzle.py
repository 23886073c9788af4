"""The order of block scales, as cuBLAS documents it and as torchao and vLLM have it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_inputs import assert_same_bits, bits, randn, seeds, some

from mixquant.formats.swizzle import swizzle, unswizzle


@some
@given(m=st.integers(1, 400), c=st.integers(1, 40), seed=seeds)
def test_swizzle_round_trip(m: int, c: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(1, 255, (m, c), dtype=torch.uint8, generator=generator)
    scales = scales.view(torch.float8_e4m3fn)
    swizzled = swizzle(scales)
    assert swizzled.shape == (-(-m // 128) * 128, -(-c // 4) * 4) and swizzled.is_contiguous()
    assert (bits(swizzled) != 0).sum() == m * c  # the padding is zero, nothing is lost
    assert_same_bits(unswizzle(swizzled, m, c), scales)
    assert_same_bits(unswizzle(swizzled.flatten(), m, c), scales)


@pytest.mark.parametrize(("m", "c"), [(1, 1), (128, 4), (129, 5), (513, 96), (32, 2), (300, 12)])
def test_swizzle_agrees_with_torchao_and_vllm(
    m: int, c: int, torchao: ModuleType, vllm: ModuleType
) -> None:
    scales = randn(m, c, seed=m).abs().to(torch.float8_e4m3fn)
    ours = swizzle(scales)
    assert_same_bits(ours.flatten(), torchao.to_blocked(scales))
    back = vllm.convert_swizzled_to_linear(ours.float(), m, c * 16, 16)
    assert torch.equal(back[:, :c], scales.float())


def test_swizzle_places_each_scale_as_cublas_documents() -> None:
    m, c = 200, 7
    scales = torch.arange(m * c).remainder(251).to(torch.uint8).view(m, c)
    flat = swizzle(scales).flatten()
    for row in (0, 1, 31, 32, 127, 128, 199):
        for column in (0, 3, 4, 6):
            tile = (row // 128) * 2 + column // 4
            r = row % 128
            place = tile * 512 + (r % 32) * 16 + (r // 32) * 4 + column % 4
            assert flat[place] == scales[row, column]


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[129, 5\], which pads to \[256, 8\]"):
        unswizzle(torch.zeros(512, dtype=torch.uint8), 129, 5)
