"""Measures the arms one after the other, at every point."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mixquant.bench.counts import read_counts
from mixquant.bench.generator import Generator, GeneratorError, generator
from mixquant.bench.summary import measurements
from mixquant.bench.workloads import LoadPoint
from mixquant.results import Measurement
from mixquant.servers.arms import ArmError, ServedArm, running, served_models, served_name

API_KEY = "OPENAI_API_KEY"  # the generator's own, too

Progress = Callable[[str, float], None]


def check_server(url: str, name: str, points: Sequence[LoadPoint]) -> None:
    """Refuses, before anything is measured, servers that cannot answer the requests.

    Raises:
        ArmError: it does not answer, does not serve the model, or its context is too short.
    """
    served = served_models(url, os.environ.get(API_KEY))
    context = served[served_name(served, name, url)]
    for point in points:
        if context is not None and point.longest > context:
            raise ArmError(
                f"{url} takes at most {context} tokens in a request; "
                f"'{point.name}' needs {point.longest}"
            )


def run(
    arms: Sequence[ServedArm],
    model: str,
    name: str,
    points: Sequence[LoadPoint],
    repeats: int,
    logs: Path,
    progress: Progress = lambda doing, share: None,
) -> Iterator[tuple[ServedArm, list[Measurement]]]:
    """Measures arm after arm.

    Args:
        model: a directory or a hub name, for the servers that are started.
        name: what requests call it.
        logs: a directory that takes what servers and the generator print.

    Yields:
        Each arm when all its points are measured.

    Raises:
        ServerError: a server did not start.
        ArmError: a server does not serve the model, or not in this length.
        GeneratorError: there is no generator, or a request failed.
    """
    work = sum(_work(point, repeats) for point in points)
    with generator(logs / "generator.log") as load:
        for number, arm in enumerate(arms):

            def done(doing: str, tokens: float, number: int = number, arm: ServedArm = arm) -> None:
                progress(f"{arm.name}: {doing}", (number + tokens / work) / len(arms))

            log = logs / f"{arm.name}.log"
            waiting = lambda doing, done=done: done(doing, 0.0)  # noqa: E731
            with running(arm, model, name=name, log=log, progress=waiting) as url:
                try:
                    check_server(url, name, points)
                    found = _measure(load, arm, url, name, points, repeats, done)
                except GeneratorError as error:
                    where = f" (its log: {log})" if arm.url is None else ""
                    raise GeneratorError(f"arm {arm.name!r}: {error}{where}") from None
            yield arm, found


def _measure(
    load: Generator,
    arm: ServedArm,
    url: str,
    name: str,
    points: Sequence[LoadPoint],
    repeats: int,
    done: Callable[[str, float], None],
) -> list[Measurement]:
    found: list[Measurement] = []
    tokens = 0.0
    for point in points:
        done(f"{point.name}, warming up", tokens)
        load.send(url, name, point.run(0), point.concurrency)
        before = read_counts(url)
        runs = []
        for number in range(1, repeats + 1):
            done(f"{point.name}, run {number} of {repeats}", tokens + point.prompt_tokens * number)
            runs.append(load.send(url, name, point.run(number), point.concurrency))
        tokens += _work(point, repeats)
        found += measurements(arm.name, point, runs, read_counts(url).since(before))
    return found


def _work(point: LoadPoint, repeats: int) -> float:
    """Prompt tokens, with those of the warm-up: the unit of progress."""
    return float(point.prompt_tokens * (repeats + 1))
