"""Row and pass counters: written by the workers, read by the API process, shared in a small file.

vLLM's workers have no way to send numbers of a plugin's own to /metrics, so the process that
configures the engine makes a file of a few integers, which each engine's first worker maps into its
memory and adds to. A reader may see a pass half counted, never a torn number.

A server with several API processes collects through prometheus_client's multiprocess mode, files in a
directory that all its processes know: there the workers take part in that, and there is no file.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mixquant.files import scratch

ROWS = (
    ("prefill", "quantized"),
    ("prefill", "precise"),
    ("decode", "quantized"),  # always 0, unless the recipe says everywhere
    ("decode", "precise"),
)
PASSES = ("quantized", "precise", "graph", "quantized_graph")
_WIDTH = len(ROWS) + len(PASSES)

_ROWS_HELP = "Token rows that went through the model, by phase and precision."
_ROWS_LABELS = ["engine", "phase", "precision"]
_PASSES_HELP = "Forward passes, by kind: quantized or precise, each of its own or as a CUDA graph."
_PASSES_LABELS = ["engine", "kind"]


class Counters:
    """The counters of one data-parallel rank, or of all of them for reading.

    Rows by phase and precision: prefill rows are prompt tokens, decode rows generated ones, drafted
    ones and generated ones that are computed again. Passes by kind: ``quantized`` has a quantized
    row, ``graph`` replayed a CUDA graph that was captured precise, ``quantized_graph`` one that was
    captured quantized, ``precise`` is every other.
    """

    def __init__(self, path: str | None, rank: int | None = None) -> None:
        self._series = _Series() if path is None else None
        if path is None:
            self._table = np.zeros((1, _WIDTH), dtype=np.int64)
            return
        mode: Any = "r" if rank is None else "r+"
        # As a plain array: each step of an engine adds to it, and memmap's own methods are slow.
        table = np.asarray(np.memmap(path, dtype=np.int64, mode=mode)).reshape(-1, _WIDTH)
        self._table = table if rank is None else table[rank : rank + 1]

    @staticmethod
    def create(ranks: int) -> str | None:
        """Makes the file, shows it on this process's /metrics, and removes it when the process ends.

        Returns:
            Its path; None in prometheus_client's multiprocess mode, where none is needed.
        """
        if multiprocess():
            return None
        folder = scratch.make("counters")
        path = str(folder / "table")
        Path(path).write_bytes(bytes(8 * _WIDTH * ranks))
        owner = os.getpid()

        def remove() -> None:
            if os.getpid() == owner:
                scratch.remove(folder)

        atexit.register(remove)
        _export(path)
        return path

    def add(self, rows: tuple[int, ...], kind: str) -> None:
        """Counts one pass: its rows in the order of ``ROWS``, and its kind."""
        counts = self._table[0]
        counts[: len(ROWS)] += rows
        counts[len(ROWS) + PASSES.index(kind)] += 1
        if self._series is not None:
            self._series.add(rows, kind)

    def rows(self) -> dict[tuple[str, str], int]:
        totals = self._table.sum(axis=0)
        return {name: int(totals[index]) for index, name in enumerate(ROWS)}

    def passes(self) -> dict[str, int]:
        totals = self._table.sum(axis=0)[len(ROWS) :]
        return {name: int(totals[index]) for index, name in enumerate(PASSES)}


def multiprocess() -> bool:
    """Whether the server's processes collect their metrics through files of prometheus_client's."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


class _Series:
    """The same counters as prometheus_client has them, of one process."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, values

        # Chosen when prometheus_client is imported, which may have been before the mode was.
        values.ValueClass = values.MultiProcessValue()
        registry = CollectorRegistry()
        self._rows = Counter("mixquant_rows", _ROWS_HELP, _ROWS_LABELS, registry=registry)
        self._passes = Counter("mixquant_passes", _PASSES_HELP, _PASSES_LABELS, registry=registry)

    def add(self, rows: tuple[int, ...], kind: str) -> None:
        for labels, count in zip(ROWS, rows, strict=True):
            self._rows.labels("0", *labels).inc(count)
        self._passes.labels("0", kind).inc()


class _Collector:
    """Every engine's counters of this process, as Prometheus families."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        rows = CounterMetricFamily("mixquant_rows", _ROWS_HELP, labels=_ROWS_LABELS)
        passes = CounterMetricFamily("mixquant_passes", _PASSES_HELP, labels=_PASSES_LABELS)
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
