"""What processes that are killed leave behind: their children, and named shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_SHARED = "/dev/shm/"


def members(session: int) -> list[int]:
    """The processes of a session that live. Empty where there is no /proc, so outside Linux."""
    found = []
    for entry in _directory("/proc"):
        if entry.isdigit():
            try:
                if os.getsid(int(entry)) == session and not _is_zombie(entry):
                    found.append(int(entry))
            except OSError:  # it ended meanwhile
                continue
    return found


def shared_memory(processes: Iterable[int]) -> set[str]:
    """Files under /dev/shm that processes have mapped, and that exist by name."""
    found = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            _, slash, name = line.partition(_SHARED)
            if slash and not name.endswith("(deleted)"):
                found.add(_SHARED + name)
    return found


def _is_zombie(process: str) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def _directory(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
