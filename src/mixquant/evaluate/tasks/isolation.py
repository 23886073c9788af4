"""Processes for code that a model's text may make hang, crash, or take all memory.

To decide whether two formulas are equal, or to execute calls that a model made, can take forever on
unforeseen input, in C code that no exception reaches. So it happens in worker processes, which are
killed when their time is up.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixquant.evaluate.tasks import TaskError

SECONDS = 10.0  # of one call, by default
_GIBIBYTES = 4  # that a worker may allocate in addition to what it starts with


class IsolationError(RuntimeError):
    """A call that was killed or crashed. The message is one line."""


async def isolated(function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> Any:
    """What a function of a module returns, computed in a worker process.

    Args:
        function: importable by name; it and its arguments can be pickled.
        seconds: until the worker is killed; waiting for a free one does not count.

    Raises:
        IsolationError: it took too long, ran out of memory, or ended the process.
        TaskError: raised by the function, or `pebble` is not installed.
    """
    with _errors_of_ours(seconds):
        return await asyncio.wrap_future(_workers().schedule(function, arguments, timeout=seconds))


def isolated_now(function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> Any:
    """As `isolated`, where there is no event loop."""
    with _errors_of_ours(seconds):
        return _workers().schedule(function, arguments, timeout=seconds).result()


@contextlib.contextmanager
def _errors_of_ours(seconds: float) -> Iterator[None]:
    try:
        yield
    except TaskError:
        raise
    except TimeoutError:
        raise IsolationError(f"took longer than {seconds:g} s") from None
    except Exception as error:
        raise IsolationError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from None


@functools.cache
def _workers() -> Any:
    try:
        from pebble import ProcessPool
    except ImportError:
        raise TaskError("this benchmark needs pebble: pip install 'mixquant[eval]'") from None
    # A fork of this process would copy its threads' locks; a fresh interpreter per killed worker
    # would import torch each time. A fork server imports once and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers = ProcessPool(
        max_workers=max(1, min(4, os.cpu_count() or 1)),
        context=context,
        initializer=_limit_memory,
    )
    atexit.register(_end, workers)
    return workers


def _end(workers: Any) -> None:
    workers.stop()
    workers.join()


def _limit_memory() -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux: the time limit has to do
        return
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _GIBIBYTES * 2**30
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
