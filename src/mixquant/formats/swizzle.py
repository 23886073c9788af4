"""The order in which tensor cores read block scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swizzle(scales: Tensor) -> Tensor:
    """Block scales in the order in which the tensor cores read them.

    Tiles of 128 x 4 scales, row-major; within a tile, row r and column c stand at
    ``(r % 32) * 16 + (r // 32) * 4 + c`` ("1D block scaling factors layout" in cuBLAS's manual;
    ``SwizzleType.SWIZZLE_32_4_4`` in PyTorch).

    Args:
        scales: ``[M, C]``, an 8-bit type; C is K/16.

    Returns:
        ``[M up to a multiple of 128, C up to a multiple of 4]``, same type, contiguous, to be read
        as a flat buffer. The padding is zero.
    """
    m, c = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -c % 4, 0, -m % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    # [row tile, r // 32, r % 32, column tile, c] -> [row tile, column tile, r % 32, r // 32, c]
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(scales.dtype)


def unswizzle(swizzled: Tensor, m: int, c: int) -> Tensor:
    """The linear block scales ``[m, c]``; undoes `swizzle`.

    Args:
        swizzled: an 8-bit type, contiguous, any shape of as many elements as `m` and `c` pad to.

    Raises:
        ValueError: it has another number of elements.
    """
    row_tiles, column_tiles = -(-m // 128), -(-c // 4)
    if swizzled.numel() != row_tiles * column_tiles * 512:
        raise ValueError(
            f"{swizzled.numel()} swizzled scales cannot be those of [{m}, {c}], "
            f"which pads to [{row_tiles * 128}, {column_tiles * 4}]"
        )
    tiles = swizzled.view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * 128, column_tiles * 4)
    return linear[:m, :c].contiguous().view(swizzled.dtype)
