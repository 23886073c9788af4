"""The server that several files of tests ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import this_machine
from served import TEMPLATE, Served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask the shared server come last: idle beside others, it takes a tenth of a core."""
    shared = [
        item
        for item in items
        if "served" in getattr(item, "fixturenames", ())
        and not hasattr(getattr(item, "module", None), "served")
        and item.path.parent == Path(__file__).parent
    ]
    items[:] = [item for item in items if item not in shared] + shared


@pytest.fixture(scope="session")
def served(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that only ask: starting one takes most of a minute."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from mixquant import Recipe
    from mixquant.evaluate.benchmarks.plan import on_cpu
    from mixquant.servers.arms import ServedArm, running

    folder = tmp_path_factory.mktemp("served")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--max-model-len", str(Served.context), "--enforce-eager"]
    arguments += ["--dtype", this_machine.SERVED_IN]
    arguments += ["--api-key", Served.key, "--chat-template", str(template)]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    arm = on_cpu(
        ServedArm("mixquant", Recipe(**this_machine.RECIPE), tuple(arguments)), Served.context
    )
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
