"""The command that a results file says it was written by."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line(*paths: Path | None) -> str:
    """This process's command; of ``paths`` in it the names alone, without folders of the machine."""
    command = shlex.join(["python", *sys.argv])
    for path in paths:
        if path is not None:
            command = command.replace(str(path), path.name)
    return command
