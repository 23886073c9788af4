"""The second checkpoint: quantized weights that somebody else made, for the prefill copy.

A recipe's ``prefill_model`` names a checkpoint in the compressed-tensors format (llm-compressor
writes it, and ``mixquant quantize``). Its quantized weights serve prefill; the main checkpoint, in
BF16, serves decode and gives everything else: embeddings, norms, biases, the output head. That is
right only if both are one model, so `PrefillCheckpoint.check_against` compares what can be compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixquant.checkpoints.models import HUB_NAME, ModelError, one_line, quantizations
from mixquant.core.layer_names import is_drafter
from mixquant.files.reading import ReadingError, parse_json, shown
from mixquant.formats import fp8, nvfp4

FormatName = Literal["nvfp4", "fp8"]

# What has to agree in the two configurations: what the shapes follow from. A key that either one
# leaves out is not compared; the shapes of the tensors themselves are.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)
# What belongs to a quantized layer besides its weight (and to the KV cache), by the end of the name.
_AUXILIARY = ("_scale", "_zero_point", "_packed", "_g_idx", "_shape")
_SAMPLED_ROWS = 8
_WHOLE_UP_TO = 2**16  # elements; larger tensors are compared by a sample of their rows
# How far, relatively, quantized rows may lie from the main model's. Rounding gives 0.10 and 0.03,
# methods that move weights (GPTQ) somewhat more; weights of another model or rotated ones, over 1.
_LARGEST_ERROR: dict[FormatName, float] = {"nvfp4": 0.25, "fp8": 0.1}


# What compressed-tensors lets stand in a group's place, with its targets: the name of a scheme.
_SCHEMES: dict[str, FormatName] = {
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8",
}


class CheckpointError(ModelError):
    """A checkpoint that cannot give the prefill copy. The message is one line."""


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


class _Part(BaseModel):
    """A part of config.json, as far as it is read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Weights(_Part):
    type: str | None = None
    num_bits: int | None = None
    strategy: str | None = None
    group_size: int | None = None
    block_structure: str | list[int] | None = None
    symmetric: bool = True
    dynamic: bool | str | None = False
    actorder: bool | str | None = None


class _Group(_Part):
    weights: _Weights | None = None  # None: of attention, whose cache may be quantized as it likes
    named: str | None = None  # by the name of a scheme instead


class _Sparsity(_Part):
    format: str = "dense"


class _Quantization(_Part):
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


class PrefillCheckpoint:
    """A compressed-tensors checkpoint whose weights are in NVFP4 or FP8. Made by `open`.

    Attributes:
        source: what the user called it.
        config: its config.json.
        formats: of each quantized layer, by its full name in the checkpoint
            (``model.layers.0.self_attn.q_proj``). Layers left out of it are not quantized there.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        formats: dict[str, FormatName],
        tensors: _Tensors,
    ) -> None:
        self.source = source
        self.config = config
        self.formats = formats
        self._tensors = tensors

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> PrefillCheckpoint:
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
        tensors = _Tensors(source, directory)
        formats: dict[str, FormatName] = {}
        for layer, fmt in _quantized_layers(tensors):
            if fmt not in supported:
                raise CheckpointError(
                    f"{source} is damaged: {layer} is stored as {fmt}, which its config.json does "
                    "not name"
                )
            formats[layer] = fmt
        if not formats:
            raise CheckpointError(f"{source} holds no quantized layer")
        return cls(source, config, formats, tensors)

    @property
    def layers(self) -> int | None:
        """How many decoder layers its configuration says that it has."""
        count = _text_config(self.config).get("num_hidden_layers")
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
        get = self._tensors.get
        if fmt == "nvfp4":
            scale = get(f"{name}.weight_global_scale").float().reshape(1)
            self._check_scale(name, scale)
            return Nvfp4Tensors(get(f"{name}.weight_packed"), get(f"{name}.weight_scale"), scale)
        codes, scale = get(f"{name}.weight"), get(f"{name}.weight_scale").float()
        self._check_scale(name, scale)
        return Fp8Tensors(codes, scale.reshape(-1, 1).expand(codes.shape[0], 1).contiguous())

    def check_against(self, main: Mapping[str, Any], main_dir: str | Path | None = None) -> None:
        """Checks that this is the main model, quantized, and nothing else changed.

        Compared are the configurations and, where the main model's files are at hand: the names
        and shapes of all tensors; those that are quantized in neither, bit by bit (small ones in
        whole: norms and biases; of embeddings a sample of rows); and a sample of rows of each
        quantized layer, which must lie near the main model's.

        Args:
            main: config.json of the main model.
            main_dir: the directory of its safetensors files; None: only configurations are compared.

        Raises:
            CheckpointError: the two do not fit together.
        """
        own = _text_config(self.config)
        other = _text_config(main)
        for key in _ARCHITECTURE:
            if None not in (own.get(key), other.get(key)) and own[key] != other[key]:
                raise self._misfit(
                    f"its {key} is {shown(own[key])}, the main model's {shown(other[key])}"
                )
        if main_dir is not None:
            self._check_tensors(_Tensors(str(main_dir), Path(main_dir)))

    def _check_tensors(self, main: _Tensors) -> None:
        for layer in self.formats:
            if f"{layer}.weight" not in main.names:
                raise self._misfit(f"the main model has no layer {layer}")
        for name in sorted(main.names):
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in self.formats:
                self._check_resemblance(layer, main)
            elif name in self._tensors.names:
                self._check_equal(name, main)
            elif not self._may_lack(name):
                raise self._misfit(f"it lacks {name}")
        for name in sorted(self._tensors.names - main.names):
            # A bias, for one, that the quantization has added to make up for its error.
            if not name.endswith((*_AUXILIARY, "lm_head.weight")):
                raise self._misfit(f"the main model has no {name}")

    def _may_lack(self, name: str) -> bool:
        if name.endswith("lm_head.weight"):
            return bool(_text_config(self.config).get("tie_word_embeddings", True))
        # Drafters of multi-token prediction, which writers drop; buffers that old ones stored.
        return is_drafter(name, self.layers) or name.endswith("rotary_emb.inv_freq")

    def _check_equal(self, name: str, main: _Tensors) -> None:
        shape, expected = self._tensors.shape(name), main.shape(name)
        if shape != expected:
            raise self._misfit(f"{name} is {shape}, in the main model {expected}")
        rows = None if math.prod(shape) <= _WHOLE_UP_TO else _sample(shape[0])
        mine, its = self._tensors.get(name, rows), main.get(name, rows)
        if mine.dtype != its.dtype:  # cast when it was saved
            its = its.to(mine.dtype)
        if not torch.equal(_bytes(mine), _bytes(its)):
            raise self._misfit(
                f"{name} differs from the main model's (SmoothQuant and AWQ fold scales into such "
                "tensors; use a checkpoint made without them)"
            )

    def _check_resemblance(self, layer: str, main: _Tensors) -> None:
        fmt = self.formats[layer]
        shape, expected = self._shape(layer), main.shape(f"{layer}.weight")
        if shape != expected:
            raise self._misfit(f"the weight of {layer} is {shape}, in the main model {expected}")
        rows = _sample(shape[0])
        its = main.get(f"{layer}.weight", rows).float()
        mine = self._rows(layer, rows).dequantize()
        error, size = float((mine - its).norm()), float(its.norm())
        if not error <= _LARGEST_ERROR[fmt] * size:
            raise self._misfit(
                f"the weight of {layer} is not the main model's (relative difference "
                f"{error / size if size else math.inf:.2f})"
            )

    def _shape(self, layer: str) -> list[int]:
        if self.formats[layer] == "nvfp4":
            n, half = self._tensors.shape(f"{layer}.weight_packed")
            return [n, half * 2]
        return self._tensors.shape(f"{layer}.weight")

    def _rows(self, layer: str, rows: Sequence[int]) -> Nvfp4Tensors | Fp8Tensors:
        """Some rows of a layer, without reading the others."""
        get = self._tensors.get
        if self.formats[layer] == "nvfp4":
            scale = get(f"{layer}.weight_global_scale").float().reshape(1)
            codes = get(f"{layer}.weight_packed", rows)
            return Nvfp4Tensors(codes, get(f"{layer}.weight_scale", rows), scale)
        scale = get(f"{layer}.weight_scale").float().reshape(-1, 1)
        codes = get(f"{layer}.weight", rows)
        return Fp8Tensors(codes, scale.expand(self._shape(layer)[0], 1)[list(rows)])

    def _check_scale(self, layer: str, scale: Tensor) -> None:
        if not bool((scale.isfinite() & (scale >= 0)).all()) or not bool(scale.any()):
            raise CheckpointError(
                f"{self.source} is damaged: {layer} has a scale that is negative, infinite or NaN, "
                "or none but zeros"
            )

    def _misfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.source} does not fit the main model: {why}")


class _Index(_Part):
    weight_map: dict[str, str]  # of a tensor, the file


class _Tensors:
    """The tensors of a directory's safetensors files, by name. A file is opened when it is asked.

    Raises:
        CheckpointError: (here and in `get`) a file is missing or damaged.
    """

    def __init__(self, source: str, directory: Path) -> None:
        self.source = source
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for file in self._list(directory):
            for name in self._handle(file).keys():  # noqa: SIM118 (it is no dict)
                self._files[name] = file
        self.names = self._files.keys()

    def shape(self, name: str) -> list[int]:
        return list(self._handle(self._files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: ``BF16``, ``F8_E4M3``, ``U8``, ..."""
        return str(self._handle(self._files[name]).get_slice(name).get_dtype())

    def get(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """A tensor, or some of its rows, of which only these are read."""
        handle = self._handle(self._files[name])
        try:
            if rows is None:
                return handle.get_tensor(name)
            part = handle.get_slice(name)
            return torch.cat([part[row : row + 1] for row in rows])
        except (OSError, SafetensorError) as error:
            raise self._unreadable(self._files[name], error) from error

    def _list(self, directory: Path) -> list[Path]:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            # Only what it names: some repositories hold the same weights a second time.
            try:
                names = set(
                    _Index.model_validate(parse_json(index.read_bytes())).weight_map.values()
                )
            except ValidationError as error:
                raise self._unreadable(index, ReadingError(_first(error))) from None
            except (OSError, ReadingError) as error:
                raise self._unreadable(index, error) from error
            return [directory / name for name in sorted(names)]
        if (single := directory / "model.safetensors").is_file():
            return [single]
        if not (files := sorted(directory.glob("*.safetensors"))):
            raise CheckpointError(f"{self.source} holds no safetensors files")
        return files

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:  # ValueError: a NUL in the name
                raise self._unreadable(file, error) from error
        return self._handles[file]

    def _unreadable(self, file: Path, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read {file.name[:100]} of {self.source}: {one_line(error)}")


def directory_of(source: str, revision: str | None = None) -> Path:
    """The directory that a source stands for; downloads a hub name's files.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(os.path.expanduser(source))
    if source and os.path.isdir(path):
        return path
    if os.path.exists(path) or not HUB_NAME.fullmatch(source):
        raise CheckpointError(f"{shown(source)} is no checkpoint: there is no such directory")
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": ["*.json", "*.safetensors"]}
    try:
        # Downloads try again for half a minute before they give up; a mistyped path must not.
        HfApi().model_info(source, revision=revision, timeout=10)
        return Path(snapshot_download(source, **wanted))
    except Exception as error:  # of many classes: no such model, gated, offline, no network
        try:
            return Path(snapshot_download(source, **wanted, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"{source} is no checkpoint: there is no such directory, and the Hugging Face hub "
                f"gave none ({one_line(error)})"
            ) from error


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
            f"{source}: its config.json: quantization_config: {_first(error)}"
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


def _first(error: ValidationError) -> str:
    """The first of the errors: which field, what was expected, and what is there."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where[:200]}: {first['msg']}, got {shown(first['input'])}"


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


def _quantized_layers(tensors: _Tensors) -> Iterator[tuple[str, FormatName]]:
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


def _why_malformed(tensors: _Tensors, layer: str, packed: bool) -> str | None:
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


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _sample(rows: int) -> list[int]:
    """The indices of some rows, evenly spaced, first and last among them."""
    count = min(rows, _SAMPLED_ROWS)
    return sorted({round(index * (rows - 1) / max(count - 1, 1)) for index in range(count)})


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def _check_range(start: int, stop: int, size: int, multiple: int = 1) -> None:
    if not 0 <= start < stop <= size:
        raise ValueError(f"{start} to {stop} is no range within {size}")
    if start % multiple or stop % multiple:
        raise ValueError(f"{start} to {stop} is not on the boundaries of blocks of {multiple}")
