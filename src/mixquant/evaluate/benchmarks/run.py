"""`mixquant evaluate`: benchmarks in several arms, from the options to the results."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from mixquant import results
from mixquant.checkpoints.models import find
from mixquant.evaluate.benchmarks.answer_file import Entry
from mixquant.evaluate.benchmarks.chat import Endpoint
from mixquant.evaluate.benchmarks.plan import (
    Benchmark,
    Options,
    chosen_tasks,
    context_of,
    load,
    name_at,
    on_cpu,
    work_of,
)
from mixquant.evaluate.benchmarks.runner import BenchmarkRun, run
from mixquant.evaluate.benchmarks.scoring import Answered, differences_of, recoveries_of, scores_of
from mixquant.evaluate.benchmarks.tool_parser import with_tool_parser
from mixquant.evaluate.tasks import Task
from mixquant.evaluate.tasks.registry import PROTOCOLS
from mixquant.files.folders import alone_in
from mixquant.servers.arms import ArmError, ServedArm, running, served_models


class Progress(Protocol):
    """Is told what a run does."""

    def note(self, message: str) -> None:
        """A line that stays."""

    def doing(self, what: str) -> None:
        """What is being done now."""

    def total(self, answers: int) -> None:
        """The number of answers that are missing in all arms together."""

    def advance(self) -> None:
        """One answer is finished, or failed."""


def evaluate(options: Options, progress: Progress) -> tuple[results.Evaluation, list[str]]:
    """Asks for all missing answers in all arms, and computes the results.

    Returns:
        The results; and what failed in the end, a line for each benchmark and arm.

    Raises:
        EvaluationError, ArmError, TaskError, AnswerFileError, ModelError, FolderError: the options
            cannot be used.
        ServerError, RunError: a server did not start, or is gone. What is finished is kept.
    """
    tasks = chosen_tasks(options)
    if options.protocol is not None:
        ours = [task.name for task in tasks if task.name not in PROTOCOLS[options.protocol]]
        if ours:
            progress.note(f"{options.protocol} says nothing of {', '.join(ours)}: asked as usual")
    options = _with_tool_parsers(options, tasks, progress)
    with alone_in(options.out, "--out"):
        context = context_of(options)
        if not torch.cuda.is_available():
            options = replace(options, arms=[on_cpu(arm, context) for arm in options.arms])
        benchmarks = []
        for task in tasks:
            progress.doing(f"reading {task.name}")
            benchmarks.append(load(task, options, context, progress.note))
        work = {
            arm.name: [work_of(benchmark, arm, options, context) for benchmark in benchmarks]
            for arm in options.arms
        }
        judge_name = options.judge.model if options.judge else None
        missing = {
            name: sum(len(one.missing(judge_name)) for one in parts) for name, parts in work.items()
        }
        progress.total(sum(missing.values()))
        for arm in options.arms:
            whole = sum(len(one.items) * one.seeds for one in work[arm.name])
            progress.note(
                f"{arm.name}: {whole - missing[arm.name]} of {whole} answers are finished"
            )
        for arm in options.arms:
            if missing[arm.name]:
                _run_arm(arm, work[arm.name], options, context, progress)
    answered = [
        Answered(
            benchmark.task,
            benchmark.items,
            benchmark.settings.seeds,
            {arm.name: work[arm.name][number].file for arm in options.arms},
            judge_name,
            benchmark.settings.first_seed,
        )
        for number, benchmark in enumerate(benchmarks)
    ]
    return _results(options, benchmarks, answered, context), _problems(options, answered)


def _with_tool_parsers(options: Options, tasks: Sequence[Task], progress: Progress) -> Options:
    """The options; if a task needs tools, each arm that is started gets a parser of calls."""
    needing = next((task.name for task in tasks if task.needs_tools), None)
    if needing is None or all(arm.url is not None for arm in options.arms):
        return options
    checkpoint = find(options.model, progress.note)
    arms = [
        arm if arm.url is not None else with_tool_parser(arm, checkpoint, needing, progress.note)
        for arm in options.arms
    ]
    return replace(options, arms=arms)


def _run_arm(
    arm: ServedArm,
    work: Sequence[BenchmarkRun],
    options: Options,
    context: int | None,
    progress: Progress,
) -> None:
    def starting(what: str) -> None:
        progress.doing(f"{arm.name}: {what}")

    source = options.model if arm.url is not None else find(options.model).source
    log = options.out / f"{arm.name}.log"
    name = name_at(arm, options)
    with running(arm, source, name=name, log=log, progress=starting) as url:
        if arm.url is None:
            served = served_models(url, options.key)[name]
            if context is not None and served is not None and served < context:
                raise ArmError(
                    f"{arm.name}: vLLM serves {served} tokens, but prompts were cut for {context}: "
                    f"give --context {served}"
                )
        asyncio.run(_ask(arm, url, name, work, options, progress))


async def _ask(
    arm: ServedArm,
    url: str,
    name: str,
    work: Sequence[BenchmarkRun],
    options: Options,
    progress: Progress,
) -> None:
    failed = 0

    def tell(one: BenchmarkRun, entry: Entry) -> None:
        nonlocal failed
        failed += entry.answer is None
        problem = f", {failed} failed" if failed else ""
        progress.doing(f"{arm.name}: {one.task.name}{problem}")
        progress.advance()

    async with contextlib.AsyncExitStack() as stack:
        patience = {"retries": options.retries, "timeout": options.timeout}
        endpoint = Endpoint(url, name, key=options.key, **patience)  # type: ignore[arg-type]
        await stack.enter_async_context(endpoint)
        judge = None
        if options.judge is not None:
            judge = Endpoint(
                options.judge.url,
                options.judge.model,
                key=options.judge.key,
                **patience,  # type: ignore[arg-type]
            )
            await stack.enter_async_context(judge)
        progress.doing(f"{arm.name}: {work[0].task.name}")
        await run(work, endpoint, judge, concurrency=options.concurrency, tell=tell)


def _results(
    options: Options,
    benchmarks: Sequence[Benchmark],
    answered: Sequence[Answered],
    context: int | None,
) -> results.Evaluation:
    names = [arm.name for arm in options.arms]
    scores: list[results.Score] = []
    parts: list[results.Score] = []
    for one in answered:
        for name in names:
            whole, groups = scores_of(one, name)
            scores += [] if whole is None else [whole]
            parts += groups
    return results.Evaluation(
        environment=results.Environment.here(),
        command=options.command,
        model=options.model,
        arms=tuple(arm.to_result() for arm in options.arms),
        settings={
            "benchmarks": {
                one.task.name: {**one.settings.to_dict(), "items": len(one.items)}
                for one in benchmarks
            },
            "judge": options.judge.model if options.judge else None,
            **({"protocol": options.protocol} if options.protocol else {}),
            "context": context,
            "concurrency": options.concurrency,
        },
        scores=tuple(scores),
        differences=tuple(found for one in answered for found in differences_of(one, names)),
        recoveries=tuple(recoveries_of(scores)),
        subscores=tuple(parts),
    )


def _problems(options: Options, answered: Sequence[Answered]) -> list[str]:
    found = []
    for one in answered:
        for arm in options.arms:
            for what, those in (
                ("requests failed", one.failed(arm.name)),
                ("answers have no verdict", one.unjudged(arm.name)),
            ):
                if those:
                    item, seed, reason = those[0]
                    found.append(
                        f"{one.task.name}, {arm.name}: {len(those)} {what}; the first, item {item} "
                        f"with seed {seed}: {reason}"
                    )
    return found
