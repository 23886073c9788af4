"""The copy out of a recipe's prefill_model: which part of its tensors is a layer's, on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.second_checkpoint import SecondCheckpoint


def expert(
    source: SecondCheckpoint, experts: str, number: int, layer: Any, features: int
) -> list[Fp8Tensors | Nvfp4Tensors]:
    """This rank's gate ``[features, K]``, up ``[features, K]`` and down ``[K, features]``.

    Args:
        source: the checkpoint.
        experts: as of `SecondCheckpoint.format_of_experts`.
        number: of the expert.
        layer: vLLM's, or what else knows the rank.
        features: of the expert's middle, on this rank.

    Raises:
        CheckpointError: the checkpoint's shapes are not those of the layer.
    """
    names = source.expert_projections(experts, number + 1)[-3:]
    gate, up, down = (source.layer(name) for name in names)
    size = down.shape[0]
    return [
        shard(gate, layer, "gate", features, size),
        shard(up, layer, "up", features, size),
        shard(down, layer, "down", size, features),
    ]


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
