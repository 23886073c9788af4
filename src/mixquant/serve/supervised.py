"""One process of a set: it starts, ends with all that it started, and starts again."""

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

LAST_LINES = 8  # of a log, shown when its process ended
ACCESS = re.compile(r'"[A-Z]+ \S+ HTTP/[\d.]+" \d{3}')  # a line of it that says who asked for what
ENDING_EARLY = 1.0  # s from the request to end to the order, for what has not started yet
CHILDREN_ENDING = 5.0  # s that its children have to notice


class Supervised:
    """One process through its lives."""

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
        self.began = 0  # where the log of this life does, in bytes
        self.child: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.has_been_ready = False
        self.lives = 0
        self.ends_in_a_row = 0
        self.given_up = False
        self.mapped: set[str] = set()  # shared memory that its processes were seen to use
        self.noted = 0.0  # when they were looked at last

    @property
    def name(self) -> str:
        return self.process.name

    async def start(self) -> None:
        inherited = () if self.listener is None else (self.listener.fileno(),)
        argv = [*self.process.argv, *(f"--fd={one}" for one in inherited)]
        with self.log.open("ab" if self.lives else "wb") as file:
            self.lives += 1
            self.began = file.tell()
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
        """Ends it and whatever it started; it may have ended by itself.

        Args:
            patience: seconds from the request to end to the order.
        """
        child = self.child
        if child is None:
            return
        if not self.ready.is_set():
            # It has no request to finish, and vLLM does not listen to SIGTERM while it starts.
            patience = min(patience, ENDING_EARLY)
        self.ready.clear()
        self.note_memory()
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(child.wait(), patience)
        if child.returncode is not None:
            # Its children have a moment of their own: they put their shared memory away when they
            # notice.
            deadline = time.monotonic() + CHILDREN_ENDING
            while members(child.pid) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        self.kill()
        await child.wait()
        while members(child.pid):
            await asyncio.sleep(0.05)
        self.child = None

    def kill(self) -> None:
        """Kills it and whatever it started, once it is seen what shared memory they use."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGSTOP)  # its own session; so they make no more
            self.note_memory()
            os.killpg(self.child.pid, signal.SIGKILL)

    def note_memory(self) -> None:
        if self.child is not None:
            self.noted = time.monotonic()
            self.mapped |= shared_memory(members(self.child.pid))

    def last_lines(self) -> str:
        """Of the log of this life; where an engine died and others say so, up to what it died of."""
        lines = read_log(self.log, self.began)
        lines = [line for line in lines if not ACCESS.search(line)] or lines
        if points_elsewhere(lines) and (at := cause(lines)) is not None:
            lines = lines[: at + 1]
        return "\n".join(f"  | {line[:300]}" for line in lines[-LAST_LINES:])
