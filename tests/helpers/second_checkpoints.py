"""Checkpoints in the compressed-tensors format, of a model that is at hand in BF16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixquant.formats import fp8, nvfp4_blocks

Tensors = dict[str, Tensor]

NVFP4_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
}
FP8_WEIGHTS: dict[str, Any] = {
    **NVFP4_WEIGHTS,
    "num_bits": 8,
    "strategy": "channel",
    "group_size": None,
}


def write(
    main: Path,
    directory: Path,
    fmt: str = "nvfp4",
    tensors: Callable[[Tensors], Any] = lambda tensors: None,
    weights: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    factor: float = 1.0,
) -> Path:
    """Writes a model as a compressed-tensors checkpoint, with something changed.

    Args:
        factor: of the weights before they are quantized, which tells them from other roundings.
    """
    directory.mkdir()
    content = _quantized(load_file(main / "model.safetensors"), fmt, factor)
    tensors(content)
    save_file(content, directory / "model.safetensors")
    scheme = {**(NVFP4_WEIGHTS if fmt == "nvfp4" else FP8_WEIGHTS), **(weights or {})}
    written = json.loads((main / "config.json").read_text()) | (config or {})
    written["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized" if fmt == "nvfp4" else "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        **(quantization or {}),
    }
    (directory / "config.json").write_text(json.dumps(written))
    return directory


def _quantized(tensors: Tensors, fmt: str, factor: float) -> Tensors:
    result: Tensors = {}
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if "proj" not in name:
            result[name] = weight
        elif fmt == "nvfp4":
            weight = weight * factor
            scale = nvfp4_blocks.global_scale(weight.abs().amax().float())
            codes, scales = nvfp4_blocks.quantize(weight, scale)
            result[f"{layer}.weight_packed"] = codes
            result[f"{layer}.weight_scale"] = scales
            result[f"{layer}.weight_global_scale"] = scale.reshape(1)
            result[f"{layer}.input_global_scale"] = torch.ones(1)
        else:
            result[name], result[f"{layer}.weight_scale"] = fp8.quantize(weight * factor)
    return result
