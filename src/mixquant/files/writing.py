"""Files that have to be on the disk before a directory takes its name, and the disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(file: Path) -> None:
    """Waits until the disk holds a file."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def is_out_of_space(error: Exception) -> bool:
    """Whether an error says that the disk is full."""
    # safetensors writes by itself and has an exception of its own.
    return getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
