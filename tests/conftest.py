"""What all tests share: how they are marked, how many examples they try, and the real model."""

from __future__ import annotations

import gc
import os

# Before anything imports huggingface_hub, which reads it once: tests never go to the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest
from example_counts import FAST, THOROUGH
from hypothesis import HealthCheck, settings

# Neither torch nor mixquant here: the process that only hands out tests needs none.

# Until all is imported: it stays, and a third of the time went into looking through it for garbage.
gc.disable()

# Which tests a folder holds. A test may be marked besides: `slow`, say.
MARKERS = {"engines": "engine", "servers": "server", "gpu": "gpu"}

# `make test-all` asks for the thorough one. On a busy machine an example takes as long as it takes.
for name, count in (("fast", FAST), ("thorough", THOROUGH)):
    settings.register_profile(
        name, max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])


def pytest_collection_finish() -> None:
    # For good: pytest searches for garbage five times at the end, and so looks only through what
    # the tests left.
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The directory of SmolLM2-135M-Instruct in BF16, converted once into the user's cache."""
    from mixquant.checkpoints import models
    from mixquant.checkpoints.errors import ModelError

    try:
        return models.find("smollm2").source
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: str) -> tuple[Any, Any]:
    """SmolLM2 in BF16, not prepared, and its tokenizer. Tests must not change either."""
    from mixquant.checkpoints import models

    return models.load(smollm2_path)
