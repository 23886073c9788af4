"""Where the time of a profiled pass went: the GPU's kernels by kind of work, and the gaps between them.

python benchmarks/kernel_times.py TRACE.json.gz     # the kinds, and the longest kernels
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# The first that a kernel's name matches counts.
KINDS = {
    "attention": r"flash|fmha|attention|paged",
    "quantize": r"quant|encode_kernel|gather_kernel",
    "linear": r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas",
    "norm": r"norm|rsqrt",
    "other": r"",
}


def trace_of(file: Path) -> list[dict[str, Any]]:
    """The events of a trace of torch.profiler."""
    data = file.read_bytes()
    found = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    return list(found["traceEvents"])


def events(trace: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """The GPU's work in a trace: name, start and length in ms."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        (event["name"], event["ts"] / 1e3, event["dur"] / 1e3)
        for event in trace
        if event.get("cat") in kinds
    ]


def count_launches(trace: list[dict[str, Any]]) -> int:
    """How often the CPU launched a kernel, or a graph of kernels, in a trace."""
    calls = ("cuda_runtime", "cuda_driver")
    return sum(event.get("cat") in calls and "Launch" in event["name"] for event in trace)


def by_kind(found: list[tuple[str, float, float]]) -> dict[str, float]:
    """ms by kind; work that ran side by side counts in each. ``idle``: when nothing ran."""
    times = dict.fromkeys([*KINDS, "idle"], 0.0)
    for name, _, length in found:
        kind = next(kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
        times[kind] += length
    end = None
    for _, start, length in sorted(found, key=lambda event: event[1]):
        if end is not None and start > end:
            times["idle"] += start - end
        end = max(end or 0.0, start + length)
    return times


def longest(found: list[tuple[str, float, float]], count: int = 25) -> list[tuple[float, int, str]]:
    """ms and number of launches of the kernels that took longest in all, by name."""
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for name, _, length in found:
        times[name] += length  # type: ignore[assignment]  # it adds floats up as well
        launches[name] += 1
    return [(time, launches[name], name) for name, time in times.most_common(count)]


def main(file: str) -> None:
    trace = trace_of(Path(file))
    found = events(trace)
    print(f"{count_launches(trace)} launches")
    for kind, time in by_kind(found).items():
        print(f"{time:9.2f} ms  {kind}")
    for time, launches, name in longest(found):
        print(f"{time:9.2f} ms {launches:6}  {name[:110]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
