"""Computes scores, differences and recoveries from the answers of all arms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixquant import results
from mixquant.evaluate.benchmarks import statistics
from mixquant.evaluate.benchmarks.answer_file import AnswerFile
from mixquant.evaluate.benchmarks.chat import Usage
from mixquant.evaluate.tasks import Item, Task

NAN = float("nan")


@dataclass(frozen=True)
class Answered:
    """One benchmark with the answers of all arms."""

    task: Task
    items: Sequence[Item]
    seeds: int
    files: Mapping[str, AnswerFile]  # by arm
    judge: str | None
    first_seed: int = 0

    @property
    def _seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def scores(self, arm: str) -> statistics.Scores:
        """``[items, seeds]``: 0 where the request failed, NaN where no judge gave a verdict."""
        entries = self.files[arm].entries
        scores = np.full((len(self.items), self.seeds), NAN)
        for row, item in enumerate(self.items):
            for column, seed in enumerate(self._seeds):
                entry = entries.get((item.id, seed))
                if entry is None or entry.answer is None:
                    scores[row, column] = 0.0
                elif entry.verdict is not None and entry.judge in (None, self.judge):
                    scores[row, column] = entry.verdict.score
        return scores

    def failed(self, arm: str) -> list[tuple[str, int, str]]:
        """Item, seed and reason of each request that got no answer."""
        entries = self.files[arm].entries
        return [
            (item.id, seed, entry.error or "")
            for item in self.items
            for seed in self._seeds
            if (entry := entries.get((item.id, seed))) is not None and entry.answer is None
        ]

    def unextracted(self, arm: str) -> list[tuple[str, int]]:
        """Item and seed of each answer in which nothing was found that could be scored."""
        entries = self.files[arm].entries
        return [
            (item.id, seed)
            for item in self.items
            for seed in self._seeds
            if (entry := entries.get((item.id, seed))) is not None
            and entry.verdict is not None
            and entry.judge in (None, self.judge)
            and not entry.verdict.extracted
        ]

    def usages(self, arm: str, items: Collection[str]) -> list[Usage]:
        """What each answer to these items took."""
        entries = self.files[arm].entries
        return [
            entry.usage
            for item in self.items
            if item.id in items
            for seed in self._seeds
            if (entry := entries.get((item.id, seed))) is not None and entry.answer is not None
        ]

    def unjudged(self, arm: str) -> list[tuple[str, int, str]]:
        """Item, seed and reason of each answer that has no verdict."""
        scores = self.scores(arm)
        return [
            (item.id, seed, self.files[arm].entries[item.id, seed].error or "")
            for row, item in enumerate(self.items)
            for column, seed in enumerate(self._seeds)
            if np.isnan(scores[row, column])
        ]


def scores_of(benchmark: Answered, arm: str) -> tuple[results.Score | None, list[results.Score]]:
    """An arm's score on a benchmark, None if nothing was judged, and those of the benchmark's groups."""
    scores = benchmark.scores(arm)
    groups = [item.group for item in benchmark.items]
    weights = statistics.item_weights(groups, benchmark.task.weights)
    whole = _score(benchmark, arm, benchmark.task.name, range(len(groups)), scores, weights)
    parts = []
    for group in _labels(benchmark):
        rows = [
            row for row, item in enumerate(benchmark.items) if group in (item.group, *item.also)
        ]
        if 0 < len(rows) < len(groups):
            name = f"{benchmark.task.name}/{group}"
            parts.append(_score(benchmark, arm, name, rows, scores[rows], None))
    return whole, [part for part in parts if part is not None]


def _labels(benchmark: Answered) -> list[str]:
    """The names of all groups, in the order in which sub-scores are shown."""
    there = dict.fromkeys(label for item in benchmark.items for label in (*item.also, item.group))
    named = [label for label in benchmark.task.order if label in there]
    return [*named, *(label for label in there if label not in named)]


def differences_of(benchmark: Answered, arms: Sequence[str]) -> list[results.Difference]:
    """The differences between each two arms, the later one minus the earlier one."""
    groups = [item.group for item in benchmark.items]
    weights = statistics.item_weights(groups, benchmark.task.weights)
    scores = {arm: benchmark.scores(arm) for arm in arms}
    found = []
    for index, arm in enumerate(arms):
        for versus in arms[:index]:
            if np.isnan(scores[arm] - scores[versus]).all():
                continue
            estimate = statistics.difference(scores[arm], scores[versus], weights)
            found.append(
                results.Difference(
                    benchmark=benchmark.task.name,
                    arm=arm,
                    versus=versus,
                    difference=estimate.value,
                    low=estimate.low,
                    high=estimate.high,
                )
            )
    return found


def recoveries_of(scores: Sequence[results.Score]) -> list[results.Recovery]:
    """The recovery for each benchmark, and for the means of several benchmarks that all arms have
    scores of."""
    arms = list(dict.fromkeys(score.arm for score in scores))
    others = [arm for arm in arms if arm not in ("bf16", "quantized")]
    if not {"bf16", "quantized"} <= set(arms):
        return []
    table: dict[str, dict[str, float]] = {}
    for score in scores:
        table.setdefault(score.benchmark, {})[score.arm] = score.score
    complete = {name: row for name, row in table.items() if len(row) == len(arms)}
    if len(complete) > 1:
        complete["mean"] = {
            arm: float(np.mean([row[arm] for row in complete.values()])) for arm in arms
        }
    return [
        results.Recovery(
            benchmark=name,
            arm=arm,
            recovery=statistics.recovery(row["bf16"], row["quantized"], row[arm]),
        )
        for name, row in complete.items()
        for arm in others
    ]


def _score(
    benchmark: Answered,
    arm: str,
    name: str,
    rows: Sequence[int],
    scores: statistics.Scores,
    weights: statistics.Scores | None,
) -> results.Score | None:
    if np.isnan(scores).all():
        return None
    estimate = statistics.score(scores, weights)
    ids = {benchmark.items[row].id for row in rows}
    usages = benchmark.usages(arm, ids)
    return results.Score(
        benchmark=name,
        arm=arm,
        score=estimate.value,
        low=estimate.low,
        high=estimate.high,
        items=len(rows),
        seeds=benchmark.seeds,
        failed=sum(item in ids for item, *_ in benchmark.failed(arm)),
        unjudged=int(np.isnan(scores).sum()),
        unextracted=sum(item in ids for item, _ in benchmark.unextracted(arm)),
        prompt_tokens=_mean([usage.prompt_tokens for usage in usages]),
        answer_tokens=_mean([usage.completion_tokens for usage in usages]),
    )


def _mean(tokens: Sequence[int]) -> float | None:
    """None where no server said how many tokens there were."""
    return sum(tokens) / len(tokens) if any(tokens) else None
