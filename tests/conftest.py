"""Shared fixtures: the real model that tests run on."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once: tests never go to the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import pytest
import torch

from mixquant import models


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(min(4, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The directory of SmolLM2-135M-Instruct in BF16, converted once into the user's cache."""
    try:
        return models.find(models.SMOLLM2).source
    except models.ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: str) -> tuple[Any, Any]:
    """SmolLM2 in BF16, not prepared, and its tokenizer. Tests must not change either."""
    return models.load(smollm2_path)
