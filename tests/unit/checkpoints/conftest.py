"""A main model, and a checkpoint of the same model in the compressed-tensors format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import second_checkpoints
import tiny_models


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in BF16: the main model."""
    directory = tmp_path_factory.mktemp("main")
    tiny_models.build("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def second(main: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the main model as a compressed-tensors checkpoint, with something changed."""

    def write(*args: Any, **kwargs: Any) -> Path:
        return second_checkpoints.write(main, tmp_path / "second", *args, **kwargs)

    return write
