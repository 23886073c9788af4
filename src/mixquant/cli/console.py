"""The terminal, and files that users name: what every command needs of them."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mixquant.errors import MixquantError

out = Console()
err = Console(stderr=True, highlight=False)

SECONDS_TO_FIRST_LINE = 3.0  # what is quicker needs no line
SECONDS_BETWEEN_LINES = 20.0


class InputError(MixquantError, ValueError):
    """Something that the user gave cannot be used. The message is one line."""


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
    """Says what is being done after some seconds and then in intervals, for output that is redirected.

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


def say(message: str) -> None:
    err.print(message, style="dim", soft_wrap=True, markup=False)


def print_error(message: str) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Before the long work, not after it."""
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a directory")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails if the name is too long
        if not _is_special(path):
            with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".mixquant-"):
                pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file such that it is there in full or not at all; a device or a pipe, as it is."""
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_results(path: Path, text: str) -> None:
    """`write_whole` of what took long: if it fails, the text is kept where there is room for it."""
    try:
        write_whole(path, text)
    except InputError as error:
        try:
            handle, kept = tempfile.mkstemp(prefix="mixquant-", suffix=path.suffix)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            raise error from None
        raise InputError(f"{error}; it is kept in {kept}") from None


def write_so_far(path: Path, text: str) -> None:
    """`write_whole` of what is not finished: if it fails, that is said, and the work goes on."""
    try:
        write_whole(path, text)
    except InputError as error:
        say(str(error))


def _is_special(path: Path) -> bool:
    """Whether it is there and is no file, so that a file must not take its place."""
    return os.path.exists(path) and not os.path.isfile(path)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".mixquant-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are for the owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
