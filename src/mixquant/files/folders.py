"""A folder that one process at a time writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mixquant.errors import MixquantError

LOCK = ".lock"
"""The file in the folder that the process locks."""


class FolderError(MixquantError, ValueError):
    """A folder that cannot be written to now. The message is one line."""


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

    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FolderError(
            f"another process writes to {folder}: wait for it, or give another {option}"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise FolderError(
            f"cannot write to {folder}: a file is in its place; name a directory with {option}"
        ) from None
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
