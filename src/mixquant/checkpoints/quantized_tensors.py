"""Quantized weights as checkpoints store them: in NVFP4 or in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixquant.formats import Kernel, fp8, nvfp4, nvfp4_blocks

FormatName = Literal["nvfp4", "fp8"]


@dataclass(frozen=True)
class Nvfp4Tensors:
    """A weight ``[N, K]`` in NVFP4, scales linear (not swizzled).

    An element is ``code * block_scale / global_scale``: ``global_scale`` is compressed-tensors'
    ``weight_global_scale``, the factor that carries the tensor into the range of codes and block
    scales (as in `mixquant.formats.nvfp4_blocks`). A kernel's tensor scale is its reciprocal.
    Layers that vLLM fuses (q, k, v; gate, up) mostly have one global scale in common; not always.
    """

    codes: Tensor  # [N, K/2] uint8, packed, the even element in the low nibble
    block_scales: Tensor  # [N, K/16] float8_e4m3fn
    global_scale: Tensor  # [1] FP32

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features N, in_features K)."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    def rows(self, start: int, stop: int) -> Nvfp4Tensors:
        """The output features ``start`` to ``stop``, as views. Raises ValueError: out of range."""
        _check_range(start, stop, self.shape[0])
        return Nvfp4Tensors(
            self.codes[start:stop], self.block_scales[start:stop], self.global_scale
        )

    def columns(self, start: int, stop: int) -> Nvfp4Tensors:
        """The input features ``start`` to ``stop`` (elements of K), as views, not contiguous.

        Raises:
            ValueError: out of range, or not on the boundaries of blocks of 16.
        """
        _check_range(start, stop, self.shape[1], nvfp4_blocks.BLOCK)
        return Nvfp4Tensors(
            self.codes[:, start // 2 : stop // 2],
            self.block_scales[:, start // nvfp4_blocks.BLOCK : stop // nvfp4_blocks.BLOCK],
            self.global_scale,
        )

    def weight_for(self, kernel: Kernel, device: torch.device) -> nvfp4.NVFP4Weight:
        """The weight on a device, laid out for a kernel."""
        codes, scales, scale = (
            one.to(device) for one in (self.codes, self.block_scales, self.global_scale)
        )
        return nvfp4.weight_of(codes, scales, scale.reciprocal(), kernel)

    def dequantize(self) -> Tensor:
        """The FP32 matrix ``[N, K]``."""
        return nvfp4_blocks.dequantize(
            self.codes, self.block_scales, self.global_scale.reciprocal()
        )


@dataclass(frozen=True)
class Fp8Tensors:
    """A weight ``[N, K]`` in FP8; an element is ``code * scale``."""

    codes: Tensor  # [N, K] float8_e4m3fn
    scale: Tensor  # [N, 1] FP32; equal throughout where the checkpoint has one for the tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features N, in_features K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, start: int, stop: int) -> Fp8Tensors:
        """The output features ``start`` to ``stop``, as views. Raises ValueError: out of range."""
        _check_range(start, stop, self.shape[0])
        return Fp8Tensors(self.codes[start:stop], self.scale[start:stop])

    def columns(self, start: int, stop: int) -> Fp8Tensors:
        """The input features ``start`` to ``stop``, as views. Raises ValueError: out of range."""
        _check_range(start, stop, self.shape[1])
        return Fp8Tensors(self.codes[:, start:stop], self.scale)

    def weight_for(self, kernel: Kernel, device: torch.device) -> fp8.Fp8Weight:
        """The weight on a device, laid out for a kernel."""
        return fp8.Fp8Weight(self.codes.to(device), self.scale.to(device), kernel, self.shape)

    def dequantize(self) -> Tensor:
        """The FP32 matrix ``[N, K]``."""
        return fp8.dequantize(self.codes, self.scale)


def _check_range(start: int, stop: int, size: int, multiple: int = 1) -> None:
    if not 0 <= start < stop <= size:
        raise ValueError(f"{start} to {stop} is no range within {size}")
    if start % multiple or stop % multiple:
        raise ValueError(f"{start} to {stop} is not on the boundaries of blocks of {multiple}")
