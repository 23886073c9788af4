"""Groups of speed measurements: each group is one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mixquant.report.derived import Speedup, arms_of, speedups, unquantized
from mixquant.report.text import count, metric_name
from mixquant.results import Measurement

_ORDER = ("length", "batch", "concurrency", "agent")
# Metrics that follow from others, or vary little, are shown as tables only.
_TABLES_ONLY = ("itl", "e2e", "total", "cached")
_AXES = {"length": ("Prompt tokens", "prompt length"), "batch": ("Batch size", "batch size")}
_CLIENTS = ("Concurrent requests", "concurrency")


@dataclass(frozen=True)
class Group:
    """One metric along one axis. No member has ``cached``: those are turns."""

    workload: str
    metric: str
    unit: str
    fixed: int | None  # the other of prompt length and concurrency; None: a trace has all lengths
    results: tuple[Measurement, ...]
    ratios: tuple[Speedup, ...]

    def x(self, m: Measurement) -> int:
        return m.tokens if self.workload == "length" else m.concurrency

    def of(self, arm: str) -> list[Measurement]:
        return sorted((m for m in self.results if m.arm == arm), key=self.x)

    def ratios_of(self, arm: str) -> list[Speedup]:
        return sorted((r for r in self.ratios if r.arm == arm), key=lambda r: self.x(r.measurement))

    @property
    def is_plotted(self) -> bool:
        if self.unit == "share" and self.workload != "agent":
            return False
        return self.metric not in _TABLES_ONLY

    @property
    def arms(self) -> tuple[str, ...]:
        return arms_of(m.arm for m in self.results)

    @cached_property
    def xs(self) -> list[int]:
        return sorted({self.x(m) for m in self.results})

    @property
    def axis(self) -> str:
        return _AXES.get(self.workload, _CLIENTS)[0]

    @property
    def title(self) -> str:
        name = metric_name(self.metric)
        if len(self.xs) > 1:
            by = f" by {_AXES.get(self.workload, _CLIENTS)[1]}"
        else:
            by = f", {self.at(self.xs[0])}"
        return f"{name}{by}, agent trace" if self.workload == "agent" else name + by

    @property
    def condition(self) -> str:
        """What all of the results have in common."""
        alone = self.xs[0] if len(self.xs) == 1 else None
        tokens, requests = (alone, self.fixed) if self.workload == "length" else (self.fixed, alone)
        said = [] if tokens is None else [f"prompts of {count(tokens)} tokens"]
        if requests is not None:
            said.append(f"{count(requests)} at a time" if requests > 1 else "one at a time")
        return ", ".join(said)

    def at(self, *xs: int) -> str:
        """Places on the axis, in words: the first and the last."""
        first, last = count(xs[0]), count(xs[-1])
        said = first if first == last else f"{first} to {last}"
        if self.workload == "length":
            return f"{said} prompt tokens"
        sizes = "batch size" if first == last else "batch sizes"
        return f"{sizes} {said}" if self.workload == "batch" else f"{said} at a time"


def groups(results: Sequence[Measurement]) -> list[Group]:
    """All results but those of turns, prompt lengths first."""
    left_out = unquantized(results)
    members: dict[tuple[str, str, str, int | None], list[Measurement]] = {}
    for m in results:
        if m.cached is None:
            fixed = {"length": m.concurrency, "agent": None}.get(m.workload, m.tokens)
            members.setdefault((m.workload, m.metric, m.unit, fixed), []).append(m)
    rank = {workload: index for index, workload in enumerate(_ORDER)}
    return sorted(
        (Group(*key, tuple(found), speedups(found, left_out)) for key, found in members.items()),
        key=lambda group: rank.get(group.workload, len(_ORDER)),
    )
