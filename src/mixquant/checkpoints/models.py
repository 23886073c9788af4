"""Finds and loads models: by directory, hub name, or ``smollm2``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixquant.checkpoints.config import quantizations, text_config
from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.smollm2 import SMOLLM2, smollm2
from mixquant.errors import one_line
from mixquant.files.reading import ReadingError, parse_json, shown

HUB_NAME = re.compile(r"(?=.{1,200}\Z)\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found; nothing of it is loaded yet."""

    name: str  # as the user gave it
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
        """The largest number of tokens that it reads and writes, if its configuration says so."""
        for config in (text_config(self.config), self.config):
            tokens = config.get("max_position_embeddings")
            if type(tokens) is int and tokens > 0:
                return tokens
        return None


def find(model: str, say: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """What a user's model argument stands for. Loads no weights.

    ``smollm2`` is converted on first use; of a hub model the configuration is fetched.

    Args:
        model: a directory, a hub name, or ``smollm2``.
        say: is told, in one line, what takes long.

    Raises:
        ModelError: there is no such model, or it is quantized already.
    """
    # os.path's functions, here and elsewhere: pathlib's raise for a name that is too long, or that names
    # an unknown user.
    directory = smollm2(say) if model == SMOLLM2 else Path(os.path.expanduser(model))
    if model and os.path.isdir(directory):
        source, config_file = str(directory), directory / "config.json"
        if not os.path.isfile(config_file):
            raise ModelError(f"{model} is not a model: the directory holds no config.json")
    elif os.path.isfile(directory):
        raise ModelError(f"{model} is a file, not a model; give the directory with its config.json")
    elif HUB_NAME.fullmatch(model):
        source, config_file = _on_hub(model)
    else:
        raise ModelError(f"{shown(model)} is not a model: there is no such directory")

    try:
        config = parse_json(config_file.read_text(encoding="utf-8"), foreign=True)
    except (OSError, UnicodeDecodeError, ReadingError) as error:
        raise ModelError(f"{model} is not a model: its config.json: {one_line(error)}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not kind or not isinstance(kind, str):
        raise ModelError(f"{model} is not a model: its config.json names no model_type")
    for other in quantizations(config):
        method = other.get("quant_method") if isinstance(other, dict) else None
        if method != "mixquant":
            named = shown(method).strip("'") if method else "unknown method"
            raise ModelError(
                f"{model} is quantized already ({named}); mixquant needs the BF16 checkpoint"
            )
    return Checkpoint(model, source, config)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.source)
    except Exception as error:  # Transformers raises any class for a broken one
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
        # Transformers would continue with random weights.
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


def _on_hub(name: str) -> tuple[str, Path]:
    """What Transformers loads for a hub name, and the local copy of its config.json."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # Downloads retry for half a minute; a mistyped path must fail sooner.
        HfApi().model_info(name, timeout=10)
        return name, Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # many classes: no such model, gated, offline, no network
        try:
            file = Path(hf_hub_download(name, "config.json", local_files_only=True))
        except Exception:
            raise ModelError(
                f"{name} is not a model: there is no such directory, and it cannot be downloaded "
                f"from the Hugging Face Hub ({one_line(error)})"
            ) from error
        return str(file.parent), file


def _cannot_load(checkpoint: Checkpoint, what: str, error: Exception) -> ModelError:
    return ModelError(f"cannot load {what} of {checkpoint.name}: {one_line(error)}")
