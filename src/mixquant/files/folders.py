"""Folders for results: made, and written to by one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mixquant.errors import MixquantError

LOCK = ".lock"
"""The file in the folder that the process locks."""


class FolderError(MixquantError, ValueError):
    """A folder that cannot be written to now. The message is one line."""


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder if it is not there.

    Args:
        option: of the command line, which names the folder.

    Raises:
        FolderError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FolderError(
            f"cannot write to {folder}: a file is in its place; name a directory with {option}"
        ) from None
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def alone_in(folder: Path, option: str) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if it is not there.

    A killed process lets others in, too.

    Args:
        option: of the command line, which names the folder.

    Raises:
        FolderError: another process is in it, or it cannot be written to.
    """
    import filelock

    make_folder(folder, option)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FolderError(
            f"another process writes to {folder}: wait for it, or give another {option}"
        ) from None
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
