"""E2M1 codes: rounding, and two codes to a byte."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_inputs import INF, NAN, assert_same_bits, some

from mixquant.formats import e2m1


def test_e2m1_rounds_half_to_even_and_saturates() -> None:
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for low, high in zip(range(7), range(1, 8), strict=True):
        middle = torch.tensor((grid[low] + grid[high]) / 2)
        below, above = torch.nextafter(middle, -middle), torch.nextafter(middle, middle * 2)
        even = low if low % 2 == 0 else high
        x = torch.stack([below, middle, above])
        assert e2m1.encode(x).tolist() == [low, even, high]
        assert e2m1.encode(-x).tolist() == [8 + low, 8 + even, 8 + high]
    assert e2m1.encode(torch.tensor(grid)).tolist() == list(range(8))
    assert e2m1.encode(torch.tensor([6.1, 7.1, 1e30, INF, -INF, NAN])).tolist() == [
        *[7, 7, 7, 7, 15, 7]
    ]


def test_e2m1_zeros_have_the_reference_signs(vllm: ModuleType) -> None:
    x = torch.tensor([0.0, -0.0, 0.1, -0.1, -1e-45])
    assert e2m1.encode(x).tolist() == [0, 0, 0, 8, 8]
    assert_same_bits(e2m1.decode(e2m1.encode(x)), vllm.cast_to_fp4(x.clone()))


def test_e2m1_codes_survive_decoding() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    negative_zero = 8  # decodes to -0.0, which encodes as 0
    again = e2m1.encode(e2m1.decode(codes))
    assert again.tolist() == [0 if code == negative_zero else code for code in range(16)]


@some
@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_pack_round_trip(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = e2m1.pack(codes)
    assert packed.tolist() == [
        a + 16 * b for a, b in zip(values[::2], values[1::2], strict=True)
    ]  # the even element low
    assert torch.equal(e2m1.unpack(packed), codes)
    assert torch.equal(e2m1.pack(e2m1.unpack(packed)), packed)


def test_unpack_agrees_with_vllm(vllm: ModuleType) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 128)
    ours = e2m1.decode(e2m1.unpack(every_byte))
    assert_same_bits(ours, vllm.break_fp4_bytes(every_byte, torch.float32))


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="odd number of codes"):
        e2m1.pack(torch.zeros(3, dtype=torch.uint8))
