"""Errors that are for people have one base class, by which the command line knows them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import mixquant
from mixquant import cli
from mixquant.errors import MixquantError, one_line

SOURCES = Path(mixquant.__file__).parent

# Caught within the package, which says what a person can do about them.
INTERNAL = {"ChatError", "IsolationError", "JudgeError", "ReadingError", "Refused"}


def error_classes() -> list[tuple[str, str]]:
    """Module and name of each class of the package that derives from a built-in exception."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        module = ".".join(("mixquant", *file.relative_to(SOURCES).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if bases & {"Exception", "ValueError", "RuntimeError", "OSError", "KeyError"}:
                    found.append((module.removesuffix(".__init__"), node.name))
    return found


def test_every_error_for_people_derives_from_the_base_class() -> None:
    pytest.importorskip("vllm", reason="modules of the plugin import vLLM")
    classes = error_classes()
    assert len(classes) > 20
    for module, name in classes:
        if name not in {*INTERNAL, "MixquantError"}:
            error = getattr(importlib.import_module(module), name)
            assert issubclass(error, MixquantError), f"{module}.{name}"
            assert issubclass(error, (ValueError, RuntimeError)), f"{module}.{name}"


def test_the_command_line_prints_any_of_them_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NewError(MixquantError, RuntimeError):
        pass

    def broken(*_: object) -> None:
        raise NewError("the model is\ntoo new")

    monkeypatch.setattr("mixquant.results.read", broken)
    assert cli.main(["report", "a.json"]) == 2
    assert capsys.readouterr().err == "error: the model is too new\n"


def test_the_reason_of_an_error_is_kept_where_it_stands_in_a_later_line() -> None:
    error = ValueError("Validation error for field 'hidden_size':\n    TypeError: expected int\n")
    assert one_line(error) == "Validation error for field 'hidden_size': TypeError: expected int"
    assert one_line(ValueError()) == "ValueError"
    long = one_line(ValueError("It failed.\n" + "at x\n" * 1_000 + "No disk space left"))
    assert len(long) < 520
    assert long.startswith("It failed. at x")
    assert long.endswith("No disk space left")
