"""Row and pass counters: written by the workers, read by the API process, shared in a small file.

vLLM's workers have no way to send numbers of a plugin's own to /metrics, so the process that
configures the engine makes a file of a few integers, which each engine's first worker maps into its
memory and adds to. A reader may see a pass half counted, never a torn number.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

ROWS = (
    ("prefill", "quantized"),
    ("prefill", "precise"),
    ("decode", "precise"),
)
PASSES = ("quantized", "precise", "graph")
_WIDTH = len(ROWS) + len(PASSES)


class Counters:
    """The counters of one data-parallel rank, or of all of them for reading.

    Rows by phase and precision: prefill rows are prompt tokens, decode rows generated ones, drafted
    ones and generated ones that are computed again. Passes by kind: ``quantized`` has a quantized
    row, ``graph`` replayed a captured CUDA graph, ``precise`` is every other.
    """

    def __init__(self, path: str, rank: int | None = None) -> None:
        mode: Any = "r" if rank is None else "r+"
        table = np.memmap(path, dtype=np.int64, mode=mode).reshape(-1, _WIDTH)
        self._table = table if rank is None else table[rank : rank + 1]

    @staticmethod
    def create(ranks: int) -> str:
        """Makes the file, shows it on this process's /metrics, and removes it when the process ends."""
        handle, path = tempfile.mkstemp(prefix="mixquant-counters-")
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(8 * _WIDTH * ranks))
        owner = os.getpid()

        def remove() -> None:
            if os.getpid() == owner:
                with suppress(OSError):
                    os.unlink(path)

        atexit.register(remove)
        _export(path)
        return path

    def add(self, quantized: int, precise: int, decode: int, kind: str) -> None:
        """Counts one pass: its quantized and precise prefill rows, its decode rows, its kind."""
        row = self._table[0]
        row[0] += quantized
        row[1] += precise
        row[2] += decode
        row[len(ROWS) + PASSES.index(kind)] += 1

    def rows(self) -> dict[tuple[str, str], int]:
        totals = self._table.sum(axis=0)
        return {name: int(totals[index]) for index, name in enumerate(ROWS)}

    def passes(self) -> dict[str, int]:
        totals = self._table.sum(axis=0)[len(ROWS) :]
        return {name: int(totals[index]) for index, name in enumerate(PASSES)}


class _Collector:
    """Every engine's counters of this process, as Prometheus families."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        rows = CounterMetricFamily(
            "mixquant_rows",
            "Token rows that went through the model, by phase and precision.",
            labels=["engine", "phase", "precision"],
        )
        passes = CounterMetricFamily(
            "mixquant_passes",
            "Forward passes, by kind: quantized, precise, or replayed from a CUDA graph.",
            labels=["engine", "kind"],
        )
        for engine, path in enumerate(self.paths):
            with suppress(OSError):
                counters = Counters(path)
                for labels, value in counters.rows().items():
                    rows.add_metric([str(engine), *labels], value)
                for kind, value in counters.passes().items():
                    passes.add_metric([str(engine), kind], value)
        yield rows
        yield passes


_collector: _Collector | None = None


def _export(path: str) -> None:
    from prometheus_client import REGISTRY

    global _collector
    if _collector is None:
        _collector = _Collector()
        REGISTRY.register(_collector)  # type: ignore[arg-type]
    _collector.paths.append(path)
