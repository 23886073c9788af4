"""Checkpoints in the compressed-tensors format, read: weights in NVFP4 or FP8.

llm-compressor writes this format, and so does ``mixquant quantize``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from mixquant.checkpoints.models import one_line, quantizations
from mixquant.checkpoints.tensor_files import (
    CheckpointError,
    TensorFiles,
    directory_of,
    first_error,
)
from mixquant.files.reading import ReadingError, parse_json, shown
from mixquant.formats import fp8, nvfp4

FormatName = Literal["nvfp4", "fp8"]

# What compressed-tensors lets stand in a group's place, with its targets: the name of a scheme.
_SCHEMES: dict[str, FormatName] = {
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8",
}


@dataclass(frozen=True)
class Nvfp4Tensors:
    """A weight ``[N, K]`` in NVFP4, scales linear (not swizzled).

    An element is ``code * block_scale / global_scale``: ``global_scale`` is compressed-tensors'
    ``weight_global_scale``, the factor that carries the tensor into the range of codes and block
    scales (`mixquant.formats.nvfp4` calls it that, too). A kernel's tensor scale is its reciprocal.
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
        _check_range(start, stop, self.shape[1], nvfp4.BLOCK)
        return Nvfp4Tensors(
            self.codes[:, start // 2 : stop // 2],
            self.block_scales[:, start // nvfp4.BLOCK : stop // nvfp4.BLOCK],
            self.global_scale,
        )

    def dequantize(self) -> Tensor:
        """The FP32 matrix ``[N, K]``."""
        return nvfp4.dequantize(self.codes, self.block_scales, self.global_scale.reciprocal())


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

    def dequantize(self) -> Tensor:
        """The FP32 matrix ``[N, K]``."""
        return fp8.dequantize(self.codes, self.scale)


class _Section(BaseModel):
    """A part of config.json, as far as it is read here."""

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
    weights: _Weights | None = None  # None: of attention, whose cache may be quantized as it likes
    named: str | None = None  # by the name of a scheme instead


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
        """In a group's place may stand its targets alone; its key then names the scheme."""
        if not isinstance(groups, dict):
            return groups
        return {
            name: {"named": name} if isinstance(group, list) else group
            for name, group in groups.items()
        }


class CompressedTensors:
    """A compressed-tensors checkpoint whose weights are in NVFP4 or FP8. Made by `open`.

    Attributes:
        source: what the user called it.
        config: its config.json.
        formats: of each quantized layer, by its full name in the checkpoint
            (``model.layers.0.self_attn.q_proj``). Layers left out of it are not quantized there.
        files: all its tensors.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        formats: dict[str, FormatName],
        files: TensorFiles,
    ) -> None:
        self.source = source
        self.config = config
        self.formats = formats
        self.files = files

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Reads the configuration and the tensors' names, types and shapes; loads no weights.

        Args:
            source: a directory or a hub name; of the latter the files are downloaded.
            revision: a branch, tag or commit, of a hub name.

        Raises:
            CheckpointError: it cannot be had, is not in the compressed-tensors format, uses a
                scheme that cannot serve here, or its files are not what its configuration says.
        """
        source = str(source)
        directory = directory_of(source, revision)
        config = _read_config(source, directory)
        supported = _formats_of_groups(source, config)
        files = TensorFiles(source, directory)
        formats: dict[str, FormatName] = {}
        for layer, fmt in _quantized_layers(files):
            if fmt not in supported:
                raise CheckpointError(
                    f"{source} is damaged: {layer} is stored as {fmt}, which its config.json does "
                    "not name"
                )
            formats[layer] = fmt
        if not formats:
            raise CheckpointError(f"{source} holds no quantized layer")
        return cls(source, config, formats, files)

    @property
    def layers(self) -> int | None:
        """How many decoder layers its configuration says that it has."""
        count = text_config(self.config).get("num_hidden_layers")
        return count if isinstance(count, int) else None

    def layer(self, name: str) -> Nvfp4Tensors | Fp8Tensors:
        """Loads the quantized weight of one layer, onto the CPU.

        Raises:
            CheckpointError: there is no such layer, its file is damaged, or a scale is no finite
                number above zero.
        """
        fmt = self.formats.get(name)
        if fmt is None:
            raise CheckpointError(f"{self.source} holds no quantized layer {name}")
        get = self.files.get
        if fmt == "nvfp4":
            scale = get(f"{name}.weight_global_scale").float().reshape(1)
            self._check_scale(name, scale)
            return Nvfp4Tensors(get(f"{name}.weight_packed"), get(f"{name}.weight_scale"), scale)
        codes, scale = get(f"{name}.weight"), get(f"{name}.weight_scale").float()
        self._check_scale(name, scale)
        return Fp8Tensors(codes, scale.reshape(-1, 1).expand(codes.shape[0], 1).contiguous())

    def shape(self, layer: str) -> list[int]:
        """Of a quantized layer: [out_features, in_features]."""
        if self.formats[layer] == "nvfp4":
            n, half = self.files.shape(f"{layer}.weight_packed")
            return [n, half * 2]
        return self.files.shape(f"{layer}.weight")

    def rows(self, layer: str, rows: Sequence[int]) -> Nvfp4Tensors | Fp8Tensors:
        """Some rows of a layer, without reading the others."""
        get = self.files.get
        if self.formats[layer] == "nvfp4":
            scale = get(f"{layer}.weight_global_scale").float().reshape(1)
            codes = get(f"{layer}.weight_packed", rows)
            return Nvfp4Tensors(codes, get(f"{layer}.weight_scale", rows), scale)
        scale = get(f"{layer}.weight_scale").float().reshape(-1, 1)
        codes = get(f"{layer}.weight", rows)
        return Fp8Tensors(codes, scale.expand(self.shape(layer)[0], 1)[list(rows)])

    def _check_scale(self, layer: str, scale: Tensor) -> None:
        if not bool((scale.isfinite() & (scale >= 0)).all()) or not bool(scale.any()):
            raise CheckpointError(
                f"{self.source} is damaged: {layer} has a scale that is negative, infinite or NaN, "
                "or none but zeros"
            )


def _read_config(source: str, directory: Path) -> dict[str, Any]:
    try:
        config = parse_json((directory / "config.json").read_bytes(), foreign=True)
    except FileNotFoundError:
        raise CheckpointError(f"{source} is no checkpoint: it holds no config.json") from None
    except (OSError, ReadingError) as error:
        raise CheckpointError(
            f"{source} is no checkpoint: its config.json: {one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is no checkpoint: its config.json is no JSON object")
    return config


def _formats_of_groups(source: str, config: Mapping[str, Any]) -> set[FormatName]:
    """The formats of the configuration's groups of layers.

    Raises:
        CheckpointError: not a compressed-tensors checkpoint, or a scheme that cannot serve here.
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
    """The format of a group's weights, or None if it is none of ours."""
    kind = (weights.type, weights.num_bits)
    reordered = weights.actorder in ("group", "dynamic", True)  # GPTQ's, of columns
    if not weights.symmetric or weights.dynamic or reordered:
        return None
    if kind == ("float", 4) and weights.strategy == "tensor_group":
        return "nvfp4" if weights.group_size == nvfp4.BLOCK else None
    if kind == ("float", 8) and weights.strategy in ("channel", "tensor"):
        return "fp8"
    return None


def _describe(weights: _Weights) -> str:
    """``int4 weights (group of 128)``, and the like."""
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


def _quantized_layers(tensors: TensorFiles) -> Iterator[tuple[str, FormatName]]:
    """The layers that are stored quantized, each with its format; checks types and shapes.

    What the tensors are decides, not the configuration's targets: these name layers by patterns
    over module names of the writer's version of Transformers.
    """
    for name in sorted(tensors.names):
        layer, _, last = name.rpartition(".")
        if last == "weight_packed":
            yield layer, "nvfp4"
        elif last == "weight" and tensors.dtype(name).startswith(("F8", "I8", "U8", "I32")):
            yield layer, "fp8"
        else:
            continue
        if why := _why_malformed(tensors, layer, packed=last == "weight_packed"):
            raise CheckpointError(f"{tensors.source} is damaged: {layer} {why}")


def _why_malformed(tensors: TensorFiles, layer: str, packed: bool) -> str | None:
    names = tensors.names
    parts = ("weight_packed", "weight_scale", "weight_global_scale") if packed else ("weight",)
    for part in (*parts, "weight_scale"):
        if f"{layer}.{part}" not in names:
            return f"has no {part}"
    for part in ("weight_zero_point", "weight_g_idx"):
        if f"{layer}.{part}" in names:
            return f"has a {part}, which NVFP4 and FP8 weights have not"

    shapes = {part: tensors.shape(f"{layer}.{part}") for part in (*parts, "weight_scale")}
    types = {part: tensors.dtype(f"{layer}.{part}") for part in (*parts, "weight_scale")}
    weight, scale = shapes[parts[0]], shapes["weight_scale"]
    if len(weight) != 2:
        return f"has a weight of the shape {weight}, no matrix"
    if 0 in weight:
        return f"has an empty weight, of the shape {weight}"
    if packed:
        expected = {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"}
        if math.prod(shapes["weight_global_scale"]) != 1:
            return f"has a weight_global_scale of the shape {shapes['weight_global_scale']}"
        fits = weight[1] % 8 == 0 and scale == [weight[0], weight[1] // 8]
    else:
        expected = {"weight": "F8_E4M3"}
        if types["weight_scale"] not in ("BF16", "F16", "F32"):
            return f"has a weight_scale of the type {types['weight_scale']}"
        fits = math.prod(scale) == 1 or scale in ([weight[0], 1], [weight[0]])
    for part, dtype in expected.items():
        if types[part] != dtype:
            return f"has a {part} of the type {types[part]}, not {dtype}"
    return None if fits else f"has a weight {weight} with scales {scale}"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the text decoder; mostly it is the whole."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _check_range(start: int, stop: int, size: int, multiple: int = 1) -> None:
    if not 0 <= start < stop <= size:
        raise ValueError(f"{start} to {stop} is no range within {size}")
    if start % multiple or stop % multiple:
        raise ValueError(f"{start} to {stop} is not on the boundaries of blocks of {multiple}")
