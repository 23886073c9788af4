"""Runs the processes of a deployment: starts, watches, restarts and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket

from mixquant.files import scratch
from mixquant.serve.commands import ENGINE_ROLES, Process
from mixquant.serve.description import Deployment, ServeError
from mixquant.serve.orphans import members, shared_memory
from mixquant.serve.supervised import Supervised
from mixquant.servers.process import reason

POLL = 1.0  # s between looks at a process
READY_POLL = 0.5  # s between looks at whether all are ready
MEMORY_POLL = 10.0  # s between looks at its shared memory
UNRESPONSIVE = 60.0  # s without an answer after which a live process counts as hung
PROBE = 10.0  # s; the time limit of one answer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before a restart; doubles each time
ENDING = 20.0  # s from SIGTERM to SIGKILL
SETTLED = 300.0  # s of health after which earlier crashes no longer count


class Supervisor:
    """The processes of one deployment."""

    def __init__(
        self,
        deployment: Deployment,
        processes: Sequence[Process],
        folder: Path,
        api_key: str | None,
        say: Callable[[str], None],
        progress: Callable[[str], None] = lambda doing: None,
        listener: socket | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            folder: takes one log for each process.
            say: is told what happens, in lines.
            progress: is told what is waited for, until all is ready.
            listener: of the public address, for the front; closed when the set ends.
        """
        self.deployment = deployment
        self.folder = folder
        self.say = say
        self.progress = progress
        self.listener = listener
        # Sockets are made there, and their paths have to be short.
        self.scratch = scratch.make("serve")
        values = {"engine-key": secrets.token_urlsafe(32), "api-key": api_key or ""}
        # A front's variables are removed, too: it would require a key that the description lacks.
        own = {deployment.api_key_variable, "MIXQUANT_API_KEY", "MIXQUANT_ENGINE_KEY"}
        inherited = {k: v for k, v in os.environ.items() if k not in own}
        self.supervised = [
            Supervised(
                process,
                folder / f"{process.name}.log",
                {
                    **inherited,
                    **process.environment,
                    **{name: values[secret] for name, secret in process.secrets.items()},
                    "TMPDIR": str(self.scratch),
                },
                listener if process.role == "front" else None,
            )
            for process in processes
        ]
        self.by_name = {one.name: one for one in self.supervised}
        self.stopping = asyncio.Event()
        self.failure: str | None = None
        self.signal: int | None = None

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Starts everything, calls ``on_ready`` once it is ready, and returns after it was told to
        stop.

        Returns:
            The exit code: 0, or what a shell calls the signal that ended it before it was ready.

        Raises:
            ServeError: something did not start, or ended more often than the description allows.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it for SIGHUP
                loop.add_signal_handler(number, self.stop, number)
        was_ready = False
        keepers = [asyncio.create_task(self._keep(one)) for one in self.supervised]
        try:
            if await self._all_ready():
                was_ready = True
                on_ready()
                await self.stopping.wait()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await self._end_all()
        if self.failure is not None:
            raise ServeError(self.failure)
        return 0 if was_ready or self.signal is None else 128 + self.signal

    def stop(self, number: int | None = None) -> None:
        """Drains and ends everything; the second time, ends it at once.

        Args:
            number: of the signal that asks for it.
        """
        self.signal = self.signal or number
        if self.listener is not None:
            self.listener.close()  # so that no client waits for a front that accepts no more
        if self.stopping.is_set():
            for one in self.supervised:
                one.kill()
        else:
            patience = self.deployment.drain_timeout
            self.say(
                f"stopping: requests in flight have {patience:g} s to finish "
                "(a second signal stops at once)"
            )
        self.stopping.set()

    async def _all_ready(self) -> bool:
        begun = time.monotonic()
        whole = f"{self.supervised[-1].process.address.url}/ready"
        stop = asyncio.create_task(self.stopping.wait())
        try:
            while not all(one.has_been_ready for one in self.supervised) and not stop.done():
                self.progress(f"{self._stage()} ({time.monotonic() - begun:.0f} s)")
                await asyncio.wait((stop,), timeout=READY_POLL)
            while (
                self.deployment.disaggregated and not stop.done() and await status_of(whole) != 200
            ):
                self.progress(
                    f"waiting for the routers to find all engines ({time.monotonic() - begun:.0f} s)"
                )
                await asyncio.wait((stop,), timeout=READY_POLL)
            return not self.stopping.is_set()
        finally:
            stop.cancel()

    def _stage(self) -> str:
        """What the start is waiting for: engines, then routers, then the front."""
        engines = [one for one in self.supervised if one.process.role in ENGINE_ROLES]
        waiting = [one.name for one in engines if not one.has_been_ready]
        if waiting:
            ready = len(engines) - len(waiting)
            return f"{ready} of {len(engines)} engines ready; loading: {', '.join(waiting)}"
        waiting = [one.name for one in self.supervised if not one.has_been_ready]
        return f"all engines ready; starting: {', '.join(waiting)}"

    async def _keep(self, one: Supervised) -> None:
        """Keeps one process running until the set stops."""
        try:
            for name in one.process.after:
                await self.by_name[name].ready.wait()
            while not self.stopping.is_set():
                await one.start()
                ended = await self._watch(one)
                await self._restart_or_give_up(one, ended)
                if one.given_up:
                    return
        except asyncio.CancelledError:
            raise
        except Exception as error:  # an error of our own: the set must not look as if it ran
            self._fail(f"{one.name}: {type(error).__name__}: {error}")

    async def _watch(self, one: Supervised) -> str:
        """Waits until a process ends or hangs. Returns how it ended."""
        assert one.child is not None
        begun = answered_at = time.monotonic()
        exit_ = asyncio.create_task(one.child.wait())
        try:
            while not exit_.done():
                now = time.monotonic()
                if now - one.noted_at > MEMORY_POLL:
                    one.note_memory()
                status = await status_of(one.process.health_url)
                if status == 200:
                    if not one.ready.is_set() and one.starts > 1:
                        self.say(f"{one.name} is back ({now - begun:.0f} s after its restart)")
                    one.has_been_ready = True
                    one.ready.set()
                    if now - begun > SETTLED:
                        one.failures_in_a_row = 0
                if status is not None:  # also 503: a front without engines works
                    answered_at = time.monotonic()
                if one.ready.is_set() and now - answered_at > UNRESPONSIVE:
                    return f"did not answer for {UNRESPONSIVE:.0f} s"
                if not one.ready.is_set() and now - begun > self.deployment.start_timeout:
                    return f"did not answer within {self.deployment.start_timeout:.0f} s"
                await asyncio.wait((exit_,), timeout=POLL)
            code = exit_.result()
            return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        finally:
            exit_.cancel()

    async def _restart_or_give_up(self, one: Supervised, ended: str) -> None:
        was_ready = one.ready.is_set()
        await one.end(patience=1)
        self._clear_memory(one)
        if self.stopping.is_set():
            return
        one.failures_in_a_row += 1
        if not was_ready and one.failures_in_a_row == 1:
            # A process that fails at its first start fails again.
            said = reason(one.log, one.log_start)
            self._fail(f"{one.name} {ended}: {said} (full log: {one.log})")
            return
        self.say(f"{one.name} {ended}; the last lines of {one.log}:\n{one.last_lines()}")
        if one.failures_in_a_row > self.deployment.max_restarts:
            one.given_up = True
            self.say(f"{one.name} ended {one.failures_in_a_row} times in a row and stays down")
            if not self._can_serve():
                self._fail(
                    f"{one.name} {ended}, and without it nothing can be served (see {one.log})"
                )
            return
        pause = min(FIRST_PAUSE * 2 ** (one.failures_in_a_row - 1), LONGEST_PAUSE)
        self.say(f"{one.name} restarts in {pause:.0f} s")
        await asyncio.sleep(pause)

    def _can_serve(self) -> bool:
        """Whether the processes that were not given up are enough to answer requests."""
        left = [one.process.role for one in self.supervised if not one.given_up]
        if not self.deployment.disaggregated:
            return bool(left)
        gone = {one.process.role for one in self.supervised if one.given_up}
        prefills = "prefill" in left or self.deployment.decode_fallback
        return "decode" in left and prefills and not gone - set(ENGINE_ROLES)

    def _fail(self, message: str) -> None:
        self.failure = self.failure or message
        if self.listener is not None:
            self.listener.close()
        self.stopping.set()

    def _clear_memory(self, one: Supervised) -> None:
        """Removes shared memory that a killed process could not remove.

        Engines of one machine map parts of each other's memory. Memory that another engine still
        uses stays.
        """
        others = [
            other for other in self.supervised if other is not one and other.child is not None
        ]
        used = set()
        for other in others:
            assert other.child is not None
            used |= shared_memory(members(other.child.pid))
        for path in one.mapped - used:
            with contextlib.suppress(OSError):
                os.unlink(path)
        one.mapped = set()

    async def _end_all(self) -> None:
        """Ends the front first, which drains; then the processes that it needs."""
        drain = self.deployment.drain_timeout + ENDING
        for one in reversed(self.supervised):
            if one.process.role in ("front", "router"):
                await one.end(drain)
        engines = [one for one in self.supervised if one.process.role in ENGINE_ROLES]
        await asyncio.gather(
            *(one.end(drain if one.process.role == "colocated" else ENDING) for one in engines)
        )
        for one in self.supervised:
            self._clear_memory(one)
        scratch.remove(self.scratch)


async def status_of(url: str) -> int | None:
    """The status of a GET of this address; None without an answer."""
    import httpx

    try:
        # verify=False: nothing here is encrypted, and reading the certificates takes long.
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=PROBE) as client:
            return (await client.get(url)).status_code
    except httpx.HTTPError:
        return None
