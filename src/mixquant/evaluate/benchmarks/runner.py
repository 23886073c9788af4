"""Asks an arm the items of benchmarks: several at a time, each until there is an answer and a
verdict.

Finished answers are written to the answer file at once, so the process may be killed at any moment.
The next run asks only for what is missing: answers, and verdicts of existing answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mixquant.errors import MixquantError
from mixquant.evaluate.benchmarks.answer_file import AnswerFile, Entry, Key
from mixquant.evaluate.benchmarks.chat import ChatError, Endpoint
from mixquant.evaluate.tasks import Item, JudgeError, Task, Verdict

# After so many failures at the very beginning, without a success, the rest would fail as well.
HOPELESS = 20


class RunError(MixquantError, RuntimeError):
    """A run that had to stop; what is finished is kept. The message is one line."""


@dataclass(frozen=True)
class BenchmarkRun:
    """One benchmark in one arm."""

    task: Task
    items: Sequence[Item]
    seeds: int
    sampling: dict[str, object]  # the options of each request
    file: AnswerFile
    first_seed: int = 0

    def missing(self, judge: str | None) -> list[tuple[Item, int]]:
        """The items and seeds without an answer, or without a verdict of this judge.

        Seeds of an item follow one another: its prompt is then in the server's prefix cache.
        """
        return [
            (item, seed)
            for item in self.items
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            if not self.finished((item.id, seed), judge)
        ]

    def finished(self, key: Key, judge: str | None) -> bool:
        entry = self.file.entries.get(key)
        if entry is None or entry.answer is None or entry.verdict is None:
            return False
        return entry.judge in (None, judge)


async def run(
    work: Sequence[BenchmarkRun],
    endpoint: Endpoint,
    judge: Endpoint | None = None,
    *,
    concurrency: int = 16,
    tell: Callable[[BenchmarkRun, Entry], None] = lambda work, entry: None,
) -> None:
    """Does the missing work, one benchmark after the other.

    Failures are written down and not asked again in this run, because requests have been retried
    already.

    Args:
        concurrency: how many items are in work at a time; each makes one request at a time.
        tell: is told what became of each.

    Raises:
        RunError: the server is gone, or refuses everything.
    """
    for one in work:
        await _Run(one, endpoint, judge, tell).do(concurrency)


class _Run:
    def __init__(
        self,
        work: BenchmarkRun,
        endpoint: Endpoint,
        judge: Endpoint | None,
        tell: Callable[[BenchmarkRun, Entry], None],
    ) -> None:
        self._work = work
        self._endpoint = endpoint
        self._judge = judge
        self._tell = tell
        self._answered = any(entry.answer is not None for entry in work.file.entries.values())
        self._failed = 0
        self._judge_is_gone = False

    async def do(self, concurrency: int) -> None:
        missing = self._work.missing(self._judge.model if self._judge else None)
        jobs = iter(missing)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(missing))):
                    group.create_task(self._worker(jobs))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._work.file.close()

    async def _worker(self, jobs: Iterator[tuple[Item, int]]) -> None:
        for item, seed in jobs:
            known = self._work.file.entries.get((item.id, seed))
            if known is None or known.answer is None:
                known = await self._ask(item, seed)
            if known.answer is not None:
                known = await self._score(item, seed, known)
            self._tell(self._work, known)

    async def _ask(self, item: Item, seed: int) -> Entry:
        chat = self._endpoint.chat(self._work.sampling)
        judge = self._judge.chat() if self._judge else None
        try:
            answer = await self._work.task.run(item, chat, seed, judge)
        except Exception as error:
            entry = Entry(None, chat.usage, error=_reason(error))
            self._work.file.add((item.id, seed), entry)
            await self._stop_if_hopeless(error)
            return entry
        self._answered = True
        entry = Entry(answer, chat.usage)
        # A verdict may take long, or fail: the answer is saved first.
        if self._work.task.needs_judge:
            self._work.file.add((item.id, seed), entry)
        return entry

    async def _score(self, item: Item, seed: int, entry: Entry) -> Entry:
        assert entry.answer is not None
        judge = self._judge.chat() if self._judge and self._work.task.needs_judge else None
        try:
            # Waiting again would not help; the next run asks again.
            if judge and self._judge_is_gone:
                raise JudgeError(f"the judge at {judge.url} does not answer any more")
            verdict = await self._work.task.score(item, entry.answer, judge)
            _check(verdict)
        except Exception as error:
            if isinstance(error, ChatError) and error.unreachable and self._judge:
                self._judge_is_gone = not await self._judge.answers()
            entry = replace(entry, error=f"no verdict: {_reason(error)}", verdict=None)
        else:
            name = judge.model if judge else None
            entry = replace(entry, error=None, verdict=verdict, judge=name)
        self._work.file.add((item.id, seed), entry)
        return entry

    async def _stop_if_hopeless(self, error: Exception) -> None:
        self._failed += 1
        if (
            isinstance(error, ChatError)
            and error.unreachable
            and not await self._endpoint.answers()
        ):
            raise RunError(
                f"the server at {self._endpoint.url} does not answer any more; "
                "what is finished is kept: run the same command again when it does"
            ) from None
        if self._failed >= HOPELESS and not self._answered:
            raise RunError(
                f"{self._work.task.name}: the first {self._failed} requests all failed, the last "
                f"with: {_reason(error)}"
            ) from None


def _check(verdict: Verdict) -> None:
    if not (math.isfinite(verdict.score) and 0 <= verdict.score <= 1):
        raise ValueError(f"the scorer gave {verdict.score}, not 0 to 1")


def _reason(error: Exception) -> str:
    if isinstance(error, (ChatError, JudgeError)):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
