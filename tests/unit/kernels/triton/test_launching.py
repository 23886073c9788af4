"""Launching a compiled kernel: what it is given, and when Triton is asked to look for it again."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant.kernels.triton import launching


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Kernel:
    """As Triton's: indexed with a grid, called, it compiles and launches."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.compiled: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append((grid, arguments, options))
            return Compiled(self.calls)

        return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "launches_directly", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    return []


def test_the_compiled_kernel_is_launched_with_pointers(calls: list[Any]) -> None:
    kernel = Kernel(calls)
    x, y = torch.zeros(64), torch.zeros(64)
    for tensors in ((x, None), (y, None)):
        launching.launch(kernel, (3, 1, 1), tensors, (5, 0.5), {"TILE": 64}, "key", num_warps=4)
    ((grid, arguments, options),) = kernel.compiled
    assert grid == (3, 1, 1) and options == {"TILE": 64, "num_warps": 4}
    assert arguments[0] is x and arguments[1:] == (None, 5, 0.5)
    # Grid, stream, function, metadata; hooks; the kernel's own, constants last.
    none = (None, None, None)
    assert calls == [(3, 1, 1, 7, "function", "metadata", *none, y.data_ptr(), None, 5, 0.5, 64)]


def test_other_keys_and_other_alignment_are_tritons(calls: list[Any]) -> None:
    kernel = Kernel(calls)
    aligned, not_aligned = torch.zeros(64), torch.zeros(64)[1:]
    for tensor, key in ((aligned, "a"), (aligned, "b"), (not_aligned, "a"), (not_aligned, "a")):
        launching.launch(kernel, (1, 1, 1), (tensor,), (), {}, key)
    assert len(kernel.compiled) == 4 and not calls
    launching.launch(kernel, (1, 1, 1), (aligned,), (), {}, "a")
    assert len(kernel.compiled) == 4 and len(calls) == 1


def test_nothing_is_kept_of_an_interpreted_kernel(calls: list[Any]) -> None:
    class Interpreted(Kernel):
        def __getitem__(self, grid: Any) -> Any:
            compile_it = super().__getitem__(grid)
            return lambda *arguments, **options: compile_it(*arguments, **options) and None

    kernel = Interpreted(calls)
    for _ in range(2):
        launching.launch(kernel, (1, 1, 1), (torch.zeros(4),), (), {}, "key")
    assert len(kernel.compiled) == 2 and not launching._compiled


@pytest.mark.parametrize(("version", "known"), [("3.6.0", True), ("3.9.1", True), ("4.0.0", False)])
def test_an_unknown_triton_launches_by_itself(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert launching.launches_directly.__wrapped__() == known
    assert known or "4.0.0" in caplog.text


def test_without_a_known_launcher_nothing_is_kept(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "launches_directly", lambda: False)
    kernel = Kernel(calls)
    for _ in range(2):
        launching.launch(kernel, (1, 1, 1), [torch.zeros(64)[::2]], [3], {}, "key")
    assert len(kernel.compiled) == 2 and not launching._compiled and not calls
