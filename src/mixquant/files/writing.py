"""Writing files safely: waiting for the disk, and recognizing a full one."""

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
    # safetensors writes files itself and raises an exception of its own.
    return getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
