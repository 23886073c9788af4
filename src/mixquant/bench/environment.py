"""The environment of measured servers, found out without taking GPU memory from them."""

from __future__ import annotations

import subprocess
import sys

from mixquant.results import Environment


def environment(elsewhere: bool) -> Environment:
    """This machine's environment.

    Args:
        elsewhere: the servers ran already, perhaps on another machine. The machine is unknown then.
    """
    # In a process of its own: in this one, CUDA would keep memory from the servers.
    ask = "from mixquant.results import Environment; print(Environment.here().model_dump_json())"
    command = [sys.executable, "-c", ask]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = Environment.model_validate_json(told.splitlines()[-1])
    unknown = {
        "device": "that of the servers at the given addresses",
        "threads": None,
        "platform": None,
    }
    return found.model_copy(update=unknown) if elsewhere else found
