"""Shared fixtures: the real model that tests run on."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once: tests never go to the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import this_machine
import torch
from example_counts import FAST, THOROUGH
from hypothesis import settings
from served import TEMPLATE, Served

from mixquant.checkpoints import models

# Which tests a folder holds. A test may be marked besides: `slow`, say.
MARKERS = {"engines": "engine", "servers": "server", "gpu": "gpu"}

# `make test-all` asks for the thorough one.
settings.register_profile("fast", max_examples=FAST)
settings.register_profile("thorough", max_examples=THOROUGH)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


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


@pytest.fixture(scope="session")
def served(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that only ask: starting one takes most of a minute."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from mixquant import Recipe
    from mixquant.evaluate.benchmarks.plan import on_cpu
    from mixquant.servers.arms import Arm, running

    folder = tmp_path_factory.mktemp("served")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--max-model-len", str(Served.context), "--enforce-eager"]
    arguments += ["--dtype", this_machine.SERVED_IN]
    arguments += ["--api-key", Served.key, "--chat-template", str(template)]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    arm = on_cpu(Arm("mixquant", Recipe(**this_machine.RECIPE), tuple(arguments)), Served.context)
    with contextlib.ExitStack() as stack:
        # As long as it lives, other servers cannot have half of the memory, vLLM's default.
        session = stack.enter_context(pytest.MonkeyPatch.context())
        session.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
            url = stack.enter_context(
                running(arm, smollm2_path, name=Served.name, log=folder / "log")
            )
        # From here on others' logs are tested, too.
        yield Served(url)
