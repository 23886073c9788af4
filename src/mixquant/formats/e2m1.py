"""E2M1: four-bit floating point, one bit of sign, two of exponent, one of mantissa."""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 6.0  # the largest value

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32)
# The two values of each byte, as two BF16 numbers in one int32 ``[256]``: one look-up of four bytes
# is far faster than two of two.
PAIRS = (
    torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1)
    .to(torch.bfloat16)
    .view(torch.int32)
    .flatten()
)


def encode(x: Tensor) -> Tensor:
    """Rounds to the nearest E2M1 code, ties to the even one; what is beyond 6 becomes 6.

    Bit-exact to vLLM's ``cast_to_fp4``: negative values that round to zero become the code of
    negative zero (8), negative zero itself that of zero. Hardware keeps both signs; the numbers are
    the same. E2M1 has no NaN: here it becomes 6, and the block's scale has to carry it.

    Args:
        x: FP32, any shape.

    Returns:
        Codes 0 to 15, uint8, same shape: the sign in bit 3, the magnitude's index in
        {0, 0.5, 1, 1.5, 2, 3, 4, 6} below it.
    """
    magnitude = x.abs()
    # The index as a function of the magnitude is the lowest of three lines, one per spacing of the
    # codes. Each is rounded before its offset is added, while that is exact.
    index = (magnitude * 2).round_()
    index = torch.minimum(index, magnitude.round().add_(2))
    index = torch.minimum(index, magnitude.mul_(0.5).round_().add_(4))
    # fmin and not clamp: what a NaN becomes as an integer is undefined.
    index = torch.fmin(index, index.new_full((), 7.0))
    return index.to(torch.uint8) | ((x < 0).view(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """The FP32 values of E2M1 codes (integers 0 to 15), same shape."""
    return _VALUES.to(codes.device)[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Packs codes ``[..., K]`` (uint8, 0 to 15) two to a byte, ``[..., K/2]``.

    The even element is in the low nibble, as CUDA's ``__nv_fp4x2_storage_t`` and vLLM have it.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of codes ({codes.shape[-1]}) two to a byte")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes ``[..., K]`` (uint8, 0 to 15) of bytes ``[..., K/2]``; undoes `pack`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
