"""The environment of measured servers, which a process of its own finds out."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from mixquant.bench.environment import environment
from mixquant.results import Environment


def test_the_machine_is_known_unless_the_servers_are_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    def once(command: list[str], **kwargs: Any) -> Any:
        if not told:
            told.append(subprocess.run(command, **kwargs).stdout)
        return SimpleNamespace(stdout=told[0])

    monkeypatch.setattr("mixquant.bench.environment.subprocess", SimpleNamespace(run=once))
    here, found = Environment.here(), environment(elsewhere=False)
    # Tests may set the number of threads.
    same = {"date": here.date, "threads": here.threads}
    assert found.model_copy(update=same) == here
    assert found.threads is not None
    away = environment(elsewhere=True)
    assert away.versions == here.versions
    assert (away.device, away.threads, away.platform) == (
        "that of the servers at the given addresses",
        None,
        None,
    )
