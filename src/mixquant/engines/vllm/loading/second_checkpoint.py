"""The copy out of a recipe's prefill_model: which of its tensors are a layer's, on this rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.prefill import PrefillCheckpoint
from mixquant.checkpoints.quantized_tensors import FormatName, Fp8Tensors, Nvfp4Tensors
from mixquant.core.layer_names import from_layers, is_drafter, is_tower


class SecondCheckpoint:
    """A quantized checkpoint, asked by vLLM's names of layers.

    Its towers and drafters are left out, whose layers are numbered as the decoder's are.

    Raises:
        CheckpointError: two of its layers may be meant by one name.
    """

    def __init__(self, checkpoint: PrefillCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._names: dict[str, str] = {}
        for name in checkpoint.formats:
            if is_tower(name) or is_drafter(name, checkpoint.layers):
                continue
            other = self._names.setdefault(from_layers(name), name)
            if other != name:
                raise CheckpointError(
                    f"{checkpoint.source} holds two layers that may be {from_layers(name)}: {other} "
                    f"and {name}; a checkpoint with one decoder is needed"
                )

    def format_of(self, layer: str) -> FormatName | None:
        """The format of a layer, or None if it is not quantized there."""
        name = self._names.get(from_layers(layer))
        return self.checkpoint.formats[name] if name is not None else None

    def layer(self, layer: str) -> Fp8Tensors | Nvfp4Tensors:
        """A layer's quantized weight, whole, on the CPU."""
        return self.checkpoint.layer(self._names[from_layers(layer)])

    def have_one_scale(self, first: str, second: str) -> bool:
        """Whether two layers may be held as one: NVFP4 has one scale for the whole tensor."""
        one, other = self.layer(first), self.layer(second)
        if isinstance(one, Nvfp4Tensors) and isinstance(other, Nvfp4Tensors):
            return torch.equal(one.global_scale, other.global_scale)
        return isinstance(one, Fp8Tensors) and isinstance(other, Fp8Tensors)

    def format_of_experts(self, experts: str, count: int) -> tuple[FormatName | None, str | None]:
        """The format of a layer of gated experts, or None and why they cannot be had from here.

        Args:
            experts: the layer's name, which those of its experts begin with.
            count: how many there are.
        """
        formats = [self.format_of(name) for name in self._expert_projections(experts, count)]
        if not any(formats):
            return None, "not quantized in the prefill model"
        if len(set(formats)) > 1:
            return None, "the prefill model has not all of them in one format"
        return formats[0], None

    def expert(
        self, experts: str, number: int, layer: Any, features: int
    ) -> list[Fp8Tensors | Nvfp4Tensors]:
        """This rank's gate ``[features, K]``, up ``[features, K]`` and down ``[K, features]``.

        Args:
            experts: as of `format_of_experts`.
            number: of the expert.
            layer: vLLM's, or what else knows the rank.
            features: of the expert's middle, on this rank.

        Raises:
            CheckpointError: the checkpoint's shapes are not those of the layer.
        """
        names = self._expert_projections(experts, number + 1)[-3:]
        gate, up, down = (self.layer(name) for name in names)
        size = down.shape[0]
        return [
            shard(gate, layer, "gate", features, size),
            shard(up, layer, "up", features, size),
            shard(down, layer, "down", size, features),
        ]

    def _expert_projections(self, experts: str, count: int) -> list[str]:
        first = next(
            (of for of in _EXPERT if self.format_of(f"{experts}.0.{of[0]}") is not None), _EXPERT[0]
        )
        return [f"{experts}.{number}.{of}" for number in range(count) for of in first]


# Gate, up and down of an expert, as checkpoints call them.
_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@functools.lru_cache(maxsize=1)
def opened(source: str) -> SecondCheckpoint:
    """The checkpoint, opened once in this process. Raises CheckpointError."""
    return SecondCheckpoint(PrefillCheckpoint.open(source))


def shard(
    tensors: Fp8Tensors | Nvfp4Tensors, layer: Any, label: str, rows: int, columns: int
) -> Fp8Tensors | Nvfp4Tensors:
    """This rank's part of a weight ``[N, K]``.

    Args:
        tensors: the whole weight.
        layer: vLLM's layer, which knows its rank.
        label: the projection within a fused layer (``k_proj``), or empty.
        rows: how many output features of it this rank has.
        columns: how many input features.

    Raises:
        CheckpointError: the checkpoint's shape is not that of the layer.
    """
    n, k = tensors.shape
    rank = int(getattr(layer, "tp_rank", 0))
    if columns != k:
        tensors = tensors.columns(rank * columns, (rank + 1) * columns)
    if rows != n:
        if label in ("k_proj", "v_proj"):
            # With fewer heads than ranks, several ranks have the same one.
            rank //= int(getattr(layer, "num_kv_head_replicas", 1))
        if n % rows or (rank + 1) * rows > n:
            raise CheckpointError(
                f"the prefill model's {label or 'layer'} has {n} output features, which do not "
                f"divide into this layer's {rows}"
            )
        tensors = tensors.rows(rank * rows, (rank + 1) * rows)
    return tensors


def joined(parts: Sequence[Fp8Tensors | Nvfp4Tensors]) -> Fp8Tensors | Nvfp4Tensors:
    """Weights of one format, and under NVFP4 of one global scale, stacked along their output."""
    first = parts[0]
    codes = torch.cat([part.codes for part in parts]).contiguous()
    if isinstance(first, Fp8Tensors):
        scales = [part.scale for part in parts if isinstance(part, Fp8Tensors)]
        return Fp8Tensors(codes, torch.cat(scales))
    blocks = [part.block_scales for part in parts if isinstance(part, Nvfp4Tensors)]
    return replace(first, codes=codes, block_scales=torch.cat(blocks).contiguous())
