"""Reads checkpoints in the compressed-tensors format with weights in NVFP4 or FP8.

llm-compressor writes this format, and so does ``mixquant quantize``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from mixquant.checkpoints.compressed_tensors_config import formats_of_groups
from mixquant.checkpoints.config import text_config
from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import FormatName, Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.tensor_files import TensorFiles, directory_of
from mixquant.errors import one_line
from mixquant.files.reading import ReadingError, parse_json


class CompressedTensors:
    """A compressed-tensors checkpoint whose weights are in NVFP4 or FP8. Made by `open`.

    Attributes:
        source: what the user called it.
        config: its config.json.
        formats: of each quantized layer, by its full name in the checkpoint
            (``model.layers.0.self_attn.q_proj``). Other layers are not quantized in the checkpoint.
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
            CheckpointError: it cannot be read, is not in the compressed-tensors format, uses a
                scheme that is not supported, or its files contradict its configuration.
        """
        source = str(source)
        directory = directory_of(source, revision)
        config = _read_config(source, directory)
        supported = formats_of_groups(source, config)
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
        """The number of decoder layers, by its configuration; None if that does not say."""
        count = text_config(self.config).get("num_hidden_layers")
        return count if isinstance(count, int) else None

    def layer(self, name: str) -> Nvfp4Tensors | Fp8Tensors:
        """Loads the quantized weight of one layer, onto the CPU.

        Raises:
            CheckpointError: there is no such layer, its file is damaged, or a scale is not a
                finite number above zero.
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
        """``[out_features, in_features]`` of a quantized layer."""
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
                "or only zeros"
            )


def _read_config(source: str, directory: Path) -> dict[str, Any]:
    try:
        config = parse_json((directory / "config.json").read_bytes(), foreign=True)
    except FileNotFoundError:
        raise CheckpointError(f"{source} is not a checkpoint: it holds no config.json") from None
    except (OSError, ReadingError) as error:
        raise CheckpointError(
            f"{source} is not a checkpoint: its config.json: {one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is not a checkpoint: its config.json is not a JSON object")
    return config


def _quantized_layers(tensors: TensorFiles) -> Iterator[tuple[str, FormatName]]:
    """The layers that are stored quantized, each with its format; checks types and shapes.

    The stored tensors decide, not the targets in the configuration: those name layers by patterns
    over the module names of the version of Transformers that wrote the checkpoint.
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
        return f"has a weight of the shape {weight}, which is not a matrix"
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
