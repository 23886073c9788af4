"""What a command shows while it works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mixquant.cli.console import err, say

SECONDS_TO_FIRST_LINE = 3.0  # what is quicker needs no line
SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, a line now and then elsewhere.

    Yields:
        A function that takes what is being done, and the share of all that is done (0 to 1).
    """
    if not err.is_terminal:
        with lines_now_and_then() as show:
            yield lambda doing, share: show(f"{doing} ({share:.0%})")
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda doing, share: bar.update(task, description=doing, completed=share)


@contextmanager
def lines_now_and_then() -> Iterator[Callable[[str], None]]:
    """Prints what is being done after some seconds and then in intervals, for output that is
    redirected.

    Yields:
        A function that takes what is being done. It prints nothing itself, so it may be called often.
    """
    doing, ended, start = "", threading.Event(), time.monotonic()

    def show(what: str) -> None:
        nonlocal doing
        doing = what

    def repeat() -> None:
        seconds = SECONDS_TO_FIRST_LINE
        while not ended.wait(seconds):
            seconds = SECONDS_BETWEEN_LINES
            if doing:
                say(f"{doing}, {time.monotonic() - start:.0f} s so far")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()


class AnswerLines:
    """`mixquant.evaluate.benchmarks.run.Progress`, where output is redirected."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._doing, self._done, self._total = "starting", 0, 0

    def note(self, message: str) -> None:
        say(message)

    def doing(self, what: str) -> None:
        self._doing = what
        self._update()

    def total(self, answers: int) -> None:
        self._total = answers
        self._update()

    def advance(self) -> None:
        self._done += 1
        self._update()

    def _update(self) -> None:
        counted = f" ({self._done} of {self._total} answers)" if self._total else ""
        self._show(f"{self._doing}{counted}")


class AnswerBar:
    """`mixquant.evaluate.benchmarks.run.Progress`, on a terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("Starting", total=None)

    def note(self, message: str) -> None:
        say(message)

    def doing(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def total(self, answers: int) -> None:
        self._bar.update(self._task, total=answers)

    def advance(self) -> None:
        self._bar.advance(self._task)


@contextmanager
def answer_progress() -> Iterator[AnswerBar | AnswerLines]:
    """A bar that counts answers on a terminal, a line now and then elsewhere."""
    if not err.is_terminal:
        with lines_now_and_then() as show:
            yield AnswerLines(show)
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        speed_estimate_period=600,  # answers take minutes
    ) as bar:
        yield AnswerBar(bar)


class StageLines:
    """A line for each stage, where there is no terminal for a spinner."""

    def __init__(self) -> None:
        self.last = ""

    def __enter__(self) -> StageLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, doing: str) -> None:
        stage = doing.rpartition(" (")[0]  # without the time, which goes on
        if stage != self.last:
            self.last = stage
            say(doing)

    def stop(self) -> None:
        pass
