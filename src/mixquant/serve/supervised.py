"""One process of a set: started, restarted, and ended together with its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from socket import socket

from mixquant.serve.commands import Process
from mixquant.serve.orphans import members, shared_memory
from mixquant.servers.process import cause, points_elsewhere, read_log, tied

LAST_LINES = 8  # of a log, shown after its process ended
ACCESS = re.compile(r'"[A-Z]+ \S+ HTTP/[\d.]+" \d{3}')  # a line of an access log
ENDING_EARLY = 1.0  # s from SIGTERM to SIGKILL, for a process that is still starting
CHILDREN_ENDING = 5.0  # s for its children to notice


class Supervised:
    """One process, over all its restarts."""

    def __init__(
        self,
        process: Process,
        log: Path,
        environment: Mapping[str, str],
        listener: socket | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            environment: all of it.
            listener: that it is to listen on, instead of one of its own.
        """
        self.process = process
        self.log = log
        self.environment = environment
        self.listener = listener
        self.log_start = 0  # byte of the log at which the present run begins
        self.child: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.has_been_ready = False
        self.starts = 0
        self.failures_in_a_row = 0
        self.given_up = False
        self.mapped: set[str] = set()  # shared memory that its processes have used
        self.noted_at = 0.0  # when that was last looked up

    @property
    def name(self) -> str:
        return self.process.name

    async def start(self) -> None:
        inherited = () if self.listener is None else (self.listener.fileno(),)
        argv = [*self.process.argv, *(f"--fd={one}" for one in inherited)]
        with self.log.open("ab" if self.starts else "wb") as file:
            self.starts += 1
            self.log_start = file.tell()
            self.child = await asyncio.create_subprocess_exec(
                *tied(argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=asyncio.subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                pass_fds=inherited,
            )

    async def end(self, patience: float) -> None:
        """Ends the process and all that it started; it may have ended already.

        Args:
            patience: seconds from the request to end to the order.
        """
        child = self.child
        if child is None:
            return
        if not self.ready.is_set():
            # It has no requests to finish, and vLLM ignores SIGTERM while it starts.
            patience = min(patience, ENDING_EARLY)
        self.ready.clear()
        self.note_memory()
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(child.wait(), patience)
        if child.returncode is not None:
            # Its children get a moment: they remove their shared memory when they notice.
            deadline = time.monotonic() + CHILDREN_ENDING
            while members(child.pid) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        self.kill()
        await child.wait()
        while members(child.pid):
            await asyncio.sleep(0.05)
        self.child = None

    def kill(self) -> None:
        """Kills the process and all that it started, after noting which shared memory they use."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGSTOP)  # so that they start no more
            self.note_memory()
            os.killpg(self.child.pid, signal.SIGKILL)

    def note_memory(self) -> None:
        if self.child is not None:
            self.noted_at = time.monotonic()
            self.mapped |= shared_memory(members(self.child.pid))

    def last_lines(self) -> str:
        """The last lines of the log of the present run; of an engine that died, up to the reason."""
        lines = read_log(self.log, self.log_start)
        lines = [line for line in lines if not ACCESS.search(line)] or lines
        if points_elsewhere(lines) and (at := cause(lines)) is not None:
            lines = lines[: at + 1]
        return "\n".join(f"  | {line[:300]}" for line in lines[-LAST_LINES:])
