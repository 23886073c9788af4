"""The quantization that a compressed-tensors checkpoint's config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mixquant.checkpoints.config import quantizations
from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import FormatName
from mixquant.checkpoints.tensor_files import first_error
from mixquant.files.reading import shown
from mixquant.formats import nvfp4_blocks

# A group may be the name of a scheme, with its targets. The schemes that are supported:
_SCHEMES: dict[str, FormatName] = {
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8",
}


class _Section(BaseModel):
    """A part of config.json: the fields that are read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Weights(_Section):
    type: str | None = None
    num_bits: int | None = None
    strategy: str | None = None
    group_size: int | None = None
    block_structure: str | list[int] | None = None
    symmetric: bool = True
    dynamic: bool | str | None = False
    actorder: bool | str | None = None


class _Group(_Section):
    weights: _Weights | None = None  # None in groups of attention, which are about the KV cache
    named: str | None = None  # the name of a scheme


class _Sparsity(_Section):
    format: str = "dense"


class _Quantization(_Section):
    """compressed-tensors' description of a checkpoint."""

    config_groups: dict[str, _Group] | None = None
    sparsity_config: _Sparsity | None = None
    transform_config: dict[str, Any] | None = None

    @field_validator("config_groups", mode="before")
    @classmethod
    def _named(cls, groups: Any) -> Any:
        """Expands a group that is only a list of targets; its key then names the scheme."""
        if not isinstance(groups, dict):
            return groups
        return {
            name: {"named": name} if isinstance(group, list) else group
            for name, group in groups.items()
        }


def formats_of_groups(source: str, config: Mapping[str, Any]) -> set[FormatName]:
    """The formats of the configuration's groups of layers.

    Raises:
        CheckpointError: not a compressed-tensors checkpoint, or a scheme that is not supported.
    """
    given = next(iter(quantizations(config)), None)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method != "compressed-tensors":
        named = shown(method).strip("'") if method else "an unknown method"
        kind = f"quantized by {named}" if given else "not quantized"
        raise CheckpointError(
            f"{source} is {kind}; a compressed-tensors checkpoint in NVFP4 or FP8 is needed "
            "(mixquant quantize writes one)"
        )

    def unsupported(what: str) -> CheckpointError:
        return CheckpointError(
            f"{source} has {what}; only NVFP4, and FP8 with a scale per channel or per tensor, "
            "can serve prefill"
        )

    try:
        quantization = _Quantization.model_validate(given)
    except ValidationError as error:
        raise CheckpointError(
            f"{source}: its config.json: quantization_config: {first_error(error)}"
        ) from None
    sparsity = quantization.sparsity_config
    if sparsity is not None and sparsity.format != "dense":
        raise unsupported(f"sparse weights ({shown(sparsity.format)})")
    if quantization.transform_config:
        raise unsupported("rotated weights (transform_config)")
    formats: set[FormatName] = set()
    for group in (quantization.config_groups or {}).values():
        if group.weights is not None:
            fmt, what = _format_of(group.weights), _describe(group.weights)
        elif group.named is not None:
            fmt, what = _SCHEMES.get(group.named), f"weights in the scheme {shown(group.named)}"
        else:
            continue
        if fmt is None:
            raise unsupported(what)
        formats.add(fmt)
    return formats


def _format_of(weights: _Weights) -> FormatName | None:
    """The format of a group's weights, or None if it is not supported."""
    kind = (weights.type, weights.num_bits)
    reordered = weights.actorder in ("group", "dynamic", True)  # GPTQ reorders columns
    if not weights.symmetric or weights.dynamic or reordered:
        return None
    if kind == ("float", 4) and weights.strategy == "tensor_group":
        return "nvfp4" if weights.group_size == nvfp4_blocks.BLOCK else None
    if kind == ("float", 8) and weights.strategy in ("channel", "tensor"):
        return "fp8"
    return None


def _describe(weights: _Weights) -> str:
    """A description such as ``int4 weights (group of 128)``."""
    kind = "float" if weights.type == "float" else "int"
    details = [str(weights.strategy)]
    if weights.group_size not in (None, -1):
        details[0] += f" of {weights.group_size}"
    if weights.block_structure is not None:
        details[0] += f" of {weights.block_structure}"
    if not weights.symmetric:
        details.append("asymmetric")
    if weights.actorder:
        details.append(f"actorder {weights.actorder}")
    return f"{kind}{weights.num_bits} weights ({', '.join(details)})"[:200]
