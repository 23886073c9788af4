"""What a model's config.json says, whichever program wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the text decoder; usually the whole."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def quantizations(config: Mapping[str, Any]) -> list[Any]:
    """The descriptions of quantized weights in a config.json, from each place that can hold one."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {})
    keys = ("quantization_config", "compression_config")
    return [section[key] for section in sections for key in keys if section.get(key)]
