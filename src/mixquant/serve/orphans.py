"""What killed processes leave behind: children, and named shared memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_SHARED = "/dev/shm/"


def members(session: int) -> list[int]:
    """The living processes of a session. Empty where there is no /proc, that is, outside Linux."""
    found = []
    for entry in _directory("/proc"):
        if entry.isdigit():
            try:
                if os.getsid(int(entry)) == session and not _is_zombie(entry):
                    found.append(int(entry))
            except OSError:  # the process ended in the meantime
                continue
    return found


def shared_memory(processes: Iterable[int]) -> set[str]:
    """The files under /dev/shm that processes have mapped and that still have a name."""
    mapped = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process}/maps").read_text()
        except OSError:
            continue
        # Address, rights, offset, device, inode, path. By inode, since a semaphore's path there is the
        # one under which glibc made it, before it got its name.
        fields = (line.split(maxsplit=5) for line in maps.splitlines())
        mapped |= {int(found[4]) for found in fields if len(found) == 6 and _SHARED in found[5]}
    if not mapped:
        return set()
    with contextlib.suppress(OSError), os.scandir(_SHARED) as entries:
        return {entry.path for entry in entries if entry.inode() in mapped}
    return set()


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
