"""What a model's config.json says, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the text decoder; mostly it is the whole."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def quantizations(config: Mapping[str, Any]) -> list[Any]:
    """What a config.json says of how its weights are quantized, in each of the places for it."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {})
    keys = ("quantization_config", "compression_config")
    return [section[key] for section in sections for key in keys if section.get(key)]
