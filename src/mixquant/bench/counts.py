"""The counters of a server, read from its /metrics: quantized prompt rows, and hits of its prefix
cache."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import dataclass

# The last token of a request may arrive a moment before the counters change.
_PATIENCE = 5.0  # s
_PAUSE = 0.1


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens. None where the server has no such counter."""

    quantized: float | None = None  # prompt tokens computed in the prefill format
    precise: float | None = None  # prompt tokens computed with the BF16 weights
    queried: float | None = None  # prompt tokens looked up in the prefix cache
    hit: float | None = None  # of these, found there

    def since(self, before: Counts) -> Counts:
        def change(name: str) -> float | None:
            now, then = getattr(self, name), getattr(before, name)
            return None if now is None or then is None else now - then

        return Counts(*map(change, ("quantized", "precise", "queried", "hit")))

    @property
    def quantized_share(self) -> float | None:
        """The share of computed prompt tokens that was quantized."""
        if self.quantized is None or self.precise is None:
            return None
        computed = self.quantized + self.precise
        return self.quantized / computed if computed else None

    @property
    def cached_share(self) -> float | None:
        """The share of all prompt tokens that the prefix cache had."""
        if self.hit is None or not self.queried:
            return None
        return self.hit / self.queried


def read_counts(url: str) -> Counts:
    """The server's counts, once they no longer change. All None without /metrics of vLLM.

    Args:
        url: without ``/v1``.
    """
    end = time.monotonic() + _PATIENCE
    counts = _read(url)
    while time.monotonic() < end:
        time.sleep(_PAUSE)
        before, counts = counts, _read(url)
        if counts == before:
            break
    return counts


def _read(url: str) -> Counts:
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            return parse(answer.read().decode())
    except (OSError, ValueError):
        return Counts()


def parse(text: str) -> Counts:
    """The counts in a page of Prometheus's text format, summed over engines.

    Raises:
        ValueError: it is none.
    """
    from prometheus_client.parser import text_string_to_metric_families

    names = {
        ("mixquant_rows_total", "quantized"): "quantized",
        ("mixquant_rows_total", "precise"): "precise",
        ("vllm:prefix_cache_queries_total", None): "queried",
        ("vllm:prefix_cache_hits_total", None): "hit",
    }
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = names.get((sample.name, sample.labels.get("precision")))
            if name is not None and sample.labels.get("phase", "prefill") == "prefill":
                found[name] = found.get(name, 0.0) + sample.value
    return Counts(**found)
