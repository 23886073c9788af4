"""The reference implementations of NVFP4."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def vllm() -> ModuleType:
    # Inside a fixture, since importing vLLM takes seconds.
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return import_module("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")


@pytest.fixture(scope="module")
def torchao() -> ModuleType:
    return import_module("torchao.prototype.mx_formats.nvfp4_tensor")
