"""An action that runs once a module has been imported."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mixquant._after_import import _finder, after_import

NAME = "module_for_after_import"
SOURCE = "VALUE = 1\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / f"{NAME}.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_finder, "actions", {})
    yield file
    sys.modules.pop(NAME, None)


@pytest.fixture
def seen(file: Path) -> list[int]:
    return []


def test_after_the_module_is_whole(file: Path, seen: list[int]) -> None:
    after_import(NAME, lambda module: seen.append(module.VALUE))
    assert NAME not in sys.modules
    assert not seen
    module = importlib.import_module(NAME)
    assert seen == [1]
    importlib.import_module(NAME)
    assert seen == [1]
    assert inspect.getsource(module) == SOURCE


def test_at_once_if_it_is_loaded(file: Path, seen: list[int]) -> None:
    importlib.import_module(NAME)
    after_import(NAME, lambda module: seen.append(module.VALUE))
    assert seen == [1]


def test_each_action_runs_once(file: Path, seen: list[int]) -> None:
    def action(module: ModuleType) -> None:
        seen.append(module.VALUE)

    after_import(NAME, action)
    after_import(NAME, action)
    after_import(NAME, lambda module: seen.append(-module.VALUE))
    importlib.import_module(NAME)
    assert seen == [1, -1]


def test_after_an_import_that_failed_and_after_a_reload(file: Path, seen: list[int]) -> None:
    after_import(NAME, lambda module: seen.append(module.VALUE))
    file.write_text("raise ImportError('not now')")
    with pytest.raises(ImportError, match="not now"):
        importlib.import_module(NAME)
    assert not seen
    file.write_text("VALUE = 22\n")  # of another length: the cached code is not taken for it
    module = importlib.import_module(NAME)
    assert seen == [22]
    importlib.reload(module)
    assert seen == [22, 22]


def test_a_module_that_is_not_there_stays_an_error(file: Path, seen: list[int]) -> None:
    after_import("no_such_module_anywhere", lambda module: seen.append(1))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")
    assert not seen
