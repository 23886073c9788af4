"""Temporary folders that are removed even if the process that made them is killed.

A folder holds a file that its process keeps locked. The lock ends with the process. So the next
process that makes a folder of this kind can see which folders are no longer used, and removes them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

_MARK = ".in-use"
_SETTLED = 60  # seconds; a younger folder may be one that its maker has not locked yet

_locks: dict[Path, int] = {}  # of this process's folders: the open file that holds the lock


def make(purpose: str) -> Path:
    """A new folder ``mixquant-PURPOSE-...`` under the temporary one, readable by this user only.

    Removes folders with this purpose and user whose processes were killed.
    """
    sweep(Path(tempfile.gettempdir()), f"mixquant-{purpose}-*")
    folder = Path(tempfile.mkdtemp(prefix=f"mixquant-{purpose}-"))
    own(folder)
    return folder


def own(folder: Path) -> None:
    """Marks a folder as in use until this process ends, or `keep` or `remove` is called."""
    import fcntl

    # Processes that this one starts do not inherit the lock. A forked one holds it, and must end, too.
    lock = os.open(folder / _MARK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _locks[folder] = lock


def keep(folder: Path) -> None:
    """Leaves a folder of this process to the user: nothing removes it any more."""
    with contextlib.suppress(OSError):
        (folder / _MARK).unlink()
    _release(folder)


def remove(folder: Path) -> None:
    """Removes a folder of this process."""
    shutil.rmtree(folder, ignore_errors=True)
    _release(folder)


def sweep(parent: Path, pattern: str) -> None:
    """Removes folders of this name whose processes, of this user, have ended."""
    for folder in parent.glob(pattern):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if about.st_uid == os.getuid() and time.time() - about.st_mtime > _SETTLED:
                _remove_if_unused(folder)


def _remove_if_unused(folder: Path) -> None:
    import fcntl

    lock = os.open(folder / _MARK, os.O_RDWR | os.O_NOFOLLOW)  # there is none in what was kept
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _release(folder: Path) -> None:
    if (lock := _locks.pop(folder, None)) is not None:
        os.close(lock)
