"""Figures and names in the form in which readers expect them."""

from __future__ import annotations

from collections.abc import Sequence

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "Time of a request",
    "prefill": "Prefill throughput",
    "output": "Output throughput",
    "total": "Total throughput",
    "quantized": "Quantized share of the prompt tokens",
    "cached": "Cached share of the prompt tokens",
    "transfer_seconds": "Time to send the KV cache",
    "transfer_bytes": "Size of the KV cache sent",
    "batch_of_16": "Time of all requests",  # of benchmarks/vllm_speed.py
}


def metric_name(metric: str) -> str:
    if metric in METRICS:
        return METRICS[metric]
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def plain(text: str) -> str:
    """The text without characters that XML cannot hold (control characters), in one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def short(text: str, limit: int = 26) -> str:
    """For a label in a plot; the table beside it has the whole."""
    text = plain(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: float) -> str:
    """Three or four significant digits, never an exponent for what people read as a number."""
    size = abs(value)
    if size >= 1e7:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    for least, digits in ((100, 1), (10, 1), (1, 2), (0.1, 3), (0.001, 4)):
        if size >= least:
            return f"{value:.{digits}f}"
    return "0" if value == 0 else f"{value:.2e}"


def tick(value: float) -> str:
    """A number on an axis: no more digits than it has."""
    return f"{value:,.6g}".replace("-", "−") if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def count(value: int) -> str:
    return f"{value:,}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares, in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 1e4 else f"{ratio:.1e}×"


def quantity(value: float, unit: str) -> str:
    return percent(value) if unit == "share" else f"{number(value)} {unit}"


def spread(low: float | None, high: float | None) -> str:
    """Lowest and highest, after the value they belong to."""
    return "" if low is None or high is None else f" ({number(low)} to {number(high)})"


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def clauses(said: Sequence[str], most: int = 4) -> str:
    """Clauses with semicolons; of many, the first, and how many more there are."""
    rest = len(said) - most
    shown = list(said[:most]) + ([f"{rest} more in the table"] if rest > 0 else [])
    return "; ".join(shown)
