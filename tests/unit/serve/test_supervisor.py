"""The supervisor over small servers that stand in for engines, routers and front: real processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing import shared_memory as shm
from pathlib import Path
from typing import Any

import pytest

from mixquant.serve import orphans, supervised, supervisor
from mixquant.serve.addresses import Address
from mixquant.serve.commands import Process, Role
from mixquant.serve.description import Deployment, ServeError
from mixquant.serve.supervised import Supervised
from mixquant.serve.supervisor import Supervisor
from mixquant.servers.ports import free_ports
from mixquant.servers.process import reason

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PATIENCE = 120  # s, for what takes a moment: only a hang is a fault
SERVER = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, *habits = sys.argv[1:]
print("hello", *habits, "key", os.environ.get("KEY"), flush=True)
print("clients' key", os.environ.get("OUTER_KEY"), flush=True)
if "fails" in habits:
    sys.exit("ValueError: this model is not one")
if "dies-inside" in habits:
    sys.exit("ValueError: of old" + 400 * "\\nINFO all is well" + os.environ["DEATH"])
def use_memory(*_):
    global kept
    import mmap
    path = "/dev/shm/" + os.environ["MEMORY"]
    file = open(path, "w+b"); file.truncate(4096); kept = mmap.mmap(file.fileno(), 4096)
    print("mapped", flush=True)
if "deaf" in habits:
    signal.signal(signal.SIGTERM, use_memory if "memory-late" in habits else signal.SIG_IGN)
else:
    def end(*_):
        print("goodbye", time.monotonic(), flush=True)
        sys.exit()
    signal.signal(signal.SIGTERM, end)
if "child" in habits:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("child", child.pid, flush=True)
if "memory" in habits:
    use_memory()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if os.path.exists(os.environ.get("STUCK", "/nowhere")):
            time.sleep(1000)
        well = not os.path.exists(os.environ.get("UNWELL", "/nowhere"))
        self.send_response(200 if well else 503); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *_): pass
print("habits are set", flush=True)
while "held" in habits and not os.path.exists(os.environ["RELEASE"]):
    time.sleep(0.02)
ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


DEATH = (
    """
(EngineCore pid=7) ERROR 11-27 10:00:01 [core.py:99] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-27 10:00:01 [core.py:99]   File "scheduler.py", line 9, in schedule
(EngineCore pid=7) ERROR 11-27 10:00:01 [core.py:99] AttributeError: 'str' object has no attribute 'get'
(APIServer pid=3) ERROR 11-27 10:00:01 [async_llm.py:5] EngineDeadError: EngineCore encountered an \
issue. See stack trace (above) for the root cause.
(APIServer pid=3) INFO:     Shutting down
(APIServer pid=3) zmq.error.ZMQError: Socket operation on non-socket
""".replace("\\\n", "")
    + "INFO:     Waiting for application shutdown.\n" * 9
)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL", 0.1)
    monkeypatch.setattr(supervisor, "READY_POLL", 0.05)
    monkeypatch.setattr(supervisor, "MEMORY_POLL", 0.05)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(supervised, "CHILDREN_ENDING", 0.2)
    monkeypatch.setattr(supervisor, "ENDING", 1.0)


@dataclass
class Set:
    """A deployment of stand-ins in a test."""

    folder: Path
    habits: dict[str, list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    deployment: Deployment = field(
        default_factory=lambda: Deployment(model="m", prefill=1, decode=1, drain_timeout=1)
    )
    said: list[str] = field(default_factory=list)
    ready: bool = False
    supervisor: Supervisor = field(init=False)

    def __post_init__(self) -> None:
        ports = iter(free_ports(len(self.habits)))
        processes = []
        for name, habits in self.habits.items():
            role: Role = next(
                one for one in ("prefill", "decode", "router", "front") if name.startswith(one)
            )
            port = next(ports)
            address = Address("127.0.0.1", "127.0.0.1", port, 0, port)
            argv = (sys.executable, "-c", SERVER, str(port), *habits)
            after = () if role in ("prefill", "decode") else ("decode-0",)
            processes.append(
                Process(
                    name,
                    role,
                    argv,
                    address,
                    "/health",
                    self.environment,
                    {"KEY": "engine-key"},
                    after,
                )
            )
        self.supervisor = Supervisor(
            self.deployment, processes, self.folder, None, self.said.append
        )

    def __getitem__(self, name: str) -> Supervised:
        return self.supervisor.by_name[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        child = self[name].child
        assert child is not None
        return child.pid

    def run(self, script: Callable[[], Awaitable[Any]]) -> None:
        """Runs the set, and the script as soon as it is ready; then stops it."""

        async def main() -> None:
            task: asyncio.Task[Any] | None = None

            async def then() -> None:
                try:
                    await asyncio.wait_for(script(), PATIENCE)
                finally:
                    self.supervisor.stop()

            def on_ready() -> None:
                nonlocal task
                self.ready = True
                task = asyncio.ensure_future(then())

            try:
                await asyncio.wait_for(self.supervisor.run(on_ready), PATIENCE)
            finally:
                if task is not None:
                    await task

        asyncio.run(main())

    def left(self) -> list[str]:
        """Processes that still run, by the marks of this set."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            ports = [str(one.process.address.port).encode() for one in self.supervisor.supervised]
            if b"ThreadingHTTPServer" in line and any(port in line.split(b"\0") for port in ports):
                found.append(entry)
        return found


async def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def nothing() -> None:
    pass


ALL: dict[str, list[str]] = {"prefill-0": [], "decode-0": [], "router-direct": [], "front": []}


def test_a_set_starts_and_ends_in_order_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # s, to say goodbye in on a busy machine; what is deaf takes all of them
    monkeypatch.setattr(supervisor, "ENDING", 2.0)
    whole = Set(tmp_path, {**ALL, "prefill-0": ["child"], "router-direct": ["deaf"]})
    whole.run(nothing)
    assert whole.ready
    assert [line.split(":")[0] for line in whole.said] == ["stopping"]
    assert whole.left() == []
    assert not whole.supervisor.scratch.exists()
    child = int(whole.log("prefill-0").split("child ")[2].split()[0])
    assert orphans._is_zombie(str(child))
    goodbye = {
        name: float(whole.log(name).split("goodbye")[1].split()[0])
        for name in ("front", "decode-0")
    }
    assert goodbye["front"] < goodbye["decode-0"]


def test_the_engine_key_is_one_and_secret(tmp_path: Path) -> None:
    whole = Set(tmp_path, ALL)
    lines: list[bytes] = []

    async def look() -> None:
        for name in ALL:
            lines.append(Path(f"/proc/{whole.pid(name)}/cmdline").read_bytes())

    whole.run(look)
    keys = {whole.log(name).split("key ")[1].split()[0] for name in ALL}
    (key,) = keys
    assert len(key) > 30
    assert not any(key.encode() in line for line in lines)


@pytest.mark.parametrize("name", list(ALL))
def test_whatever_is_killed_starts_again(tmp_path: Path, name: str) -> None:
    whole = Set(tmp_path, ALL)

    async def kill() -> None:
        first = whole.pid(name)
        os.kill(first, signal.SIGKILL)
        await until(lambda: whole[name].ready.is_set() and whole.pid(name) != first)

    whole.run(kill)
    assert whole.left() == []
    assert any(f"{name} ended by signal 9; the last lines" in line for line in whole.said)
    assert "  | hello" in "".join(whole.said)
    assert any(f"{name} restarts in" in line for line in whole.said)
    assert any(f"{name} is back" in line for line in whole.said)
    assert whole.log(name).count("hello") == 2


def test_one_that_does_not_start_ends_all_and_says_why(tmp_path: Path) -> None:
    whole = Set(tmp_path, {**ALL, "decode-0": ["fails"], "prefill-0": ["child"]})
    with pytest.raises(ServeError, match="decode-0 ended with exit code 1: ValueError: this model"):
        whole.run(nothing)
    assert not whole.ready
    assert whole.left() == []
    assert "\n" not in str(whole.supervisor.failure)


def test_one_whose_engine_dies_says_what_of(tmp_path: Path) -> None:
    whole = Set(tmp_path, {**ALL, "decode-0": ["dies-inside"]}, {"DEATH": DEATH})
    wanted = (
        r"decode-0 ended with exit code 1: AttributeError: 'str' object has no attribute 'get' \("
    )
    with pytest.raises(ServeError, match=wanted):
        whole.run(nothing)
    lines = whole["decode-0"].last_lines().splitlines()
    assert len(lines) == supervised.LAST_LINES
    assert "'str' object has no attribute 'get'" in lines[-1]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it printed nothing"),
        ("hello\n", "hello"),
        ("ValueError: a\nmore\n", "ValueError: a"),
        ("KeyError: a\nRuntimeError: Engine core failed. See root cause above. {}\n", "KeyError: a"),
        (
            "RuntimeError: Engine core failed. See root cause above. Failed core proc(s): {'E': -9}\n"
            "noise\n",
            "RuntimeError: Engine core failed. Failed core proc(s): {'E': -9} (killed: memory may have "
            "run out)",
        ),
        ("ValueError: of old\n" + "INFO\n" * 999 + "E. See root cause above.\nnoise\n", "E."),
        ("KeyError: mixquant cannot serve this\nOSError: c\n", "KeyError: mixquant cannot serve this"),
    ],
)  # fmt: skip
def test_the_reason_in_a_log(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "log"
    path.write_text("OSError: of another life\n" + log)
    assert reason(path, len("OSError: of another life\n")) == said


def test_the_last_lines_are_of_this_life_and_not_who_asked_for_its_health(tmp_path: Path) -> None:
    one = Set(tmp_path, ALL)["decode-0"]
    health = '(APIServer pid=1) INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK\n'
    one.log.write_text("of another life\n" + "first\n" + "last\n" + 20 * health)
    one.log_start = len("of another life\n")
    assert one.last_lines() == "  | first\n  | last"
    one.log.write_text("of another life\n" + health)
    assert one.last_lines() == f"  | {health.strip()}"


def test_an_engine_is_not_told_the_key_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTER_KEY", "secret")
    described = Deployment(
        model="m", prefill=1, decode=1, drain_timeout=1, api_key_variable="OUTER_KEY"
    )
    whole = Set(tmp_path, ALL, deployment=described)
    whole.run(nothing)
    for name in ALL:
        assert "clients' key None" in whole.log(name)


def test_no_process_inherits_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front would ask for the one of clients, though no key is described."""
    names = ("MIXQUANT_API_KEY", "MIXQUANT_ENGINE_KEY")
    for name in names:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OUTER_KEY", "kept")
    whole = Set(tmp_path, ALL)
    for one in whole.supervisor.supervised:
        assert not set(names) & set(one.environment)
        assert one.environment["OUTER_KEY"] == "kept"


def test_one_line_for_each_stage(tmp_path: Path) -> None:
    held = {**ALL, "router-direct": ["held"], "front": ["held"]}
    release = tmp_path / "release"
    whole = Set(tmp_path, held, {"RELEASE": str(release)})
    stages: list[str] = []

    def hear(stage: str) -> None:
        stages.append(stage)
        if stage.startswith("all engines ready; starting: "):
            release.touch()

    whole.supervisor.progress = hear
    whole.run(nothing)  # which ends only if that stage was told
    assert stages[0] == "0 of 2 engines ready; loading: prefill-0, decode-0 (0 s)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("starting", [True, False])
def test_the_exit_code_says_whether_it_was_ready(
    tmp_path: Path, number: signal.Signals, starting: bool
) -> None:
    if starting:
        (tmp_path / "stuck").touch()
    whole = Set(tmp_path, ALL, {"STUCK": str(tmp_path / "stuck")})

    async def main() -> int:
        ready = asyncio.Event()
        running = asyncio.ensure_future(whole.supervisor.run(ready.set))
        one = whole["decode-0"]
        if starting:
            await until(lambda: one.starts > 0 and "are set" in whole.log("decode-0"))
        else:
            await ready.wait()
        os.kill(os.getpid(), number)
        return await asyncio.wait_for(running, PATIENCE)

    assert asyncio.run(main()) == (128 + number if starting else 0)
    assert whole.left() == []


# The package is a stand-in without torch, whose import takes far longer than what is tested.
BARE_PACKAGE = f"""
import sys, types
package = types.ModuleType("mixquant")
package.__path__ = [{str(Path(orphans.__file__).parents[1])!r}]
sys.modules["mixquant"] = package
"""
STARTER = """
import subprocess, sys, time
from mixquant.servers.process import tied
subprocess.Popen(tied(sys.argv[1:]), start_new_session=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("habits", [["deaf", "child"], ["child"]])
def test_when_the_starter_is_killed_all_ends(tmp_path: Path, habits: list[str]) -> None:
    """Also what does not heed SIGTERM, as vLLM while it starts, and its children."""
    (port,) = free_ports(1)
    log = tmp_path / "log"
    with log.open("wb") as file:
        starter = subprocess.Popen(
            [
                sys.executable,
                "-c",
                BARE_PACKAGE + STARTER,
                sys.executable,
                "-c",
                SERVER,
                str(port),
                *habits,
            ],
            stdout=file,
            stderr=file,
        )

    async def main() -> None:
        await until(lambda: "habits are set" in log.read_text())
        child = int(log.read_text().split("child ")[2].split()[0])
        session = os.getsid(child)
        assert len(orphans.members(session)) == 3  # the server, its child, and who watches
        starter.kill()
        starter.wait()
        await until(lambda: not orphans.members(session))
        assert ("goodbye" in log.read_text()) == ("deaf" not in habits)

    asyncio.run(main())


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("child", child.pid, os.getsid(0), flush=True)
"""
CHILD = re.compile(r"^child (\d+) (\d+)$", re.MULTILINE)
# Has the script that ties processes begin with a line more.
CHANGED = """
from mixquant.servers import process
process._TIED = {!r} + chr(10) + process._TIED
"""


@pytest.mark.parametrize("change", ["", "import os; del os.pidfd_open"])
def test_the_children_of_one_that_ended_first_end_with_the_starter(
    tmp_path: Path, change: str
) -> None:
    log = tmp_path / "log"
    script = BARE_PACKAGE + CHANGED.format(change) + STARTER
    with log.open("wb") as file:
        starter = subprocess.Popen(
            [sys.executable, "-c", script, sys.executable, "-c", PARENT], stdout=file, stderr=file
        )

    async def main() -> None:
        await until(lambda: CHILD.search(log.read_text()) is not None)
        child, session = map(int, CHILD.findall(log.read_text())[0])
        await until(lambda: orphans._is_zombie(str(session)))
        assert child in orphans.members(session)
        starter.kill()
        starter.wait()
        await until(lambda: not orphans.members(session))

    try:
        asyncio.run(main())
    finally:
        starter.kill()


@pytest.mark.parametrize("change", ["import os; del os.pidfd_open", "import os; del os.setpgid"])
def test_one_that_cannot_be_tied_says_so(tmp_path: Path, change: str) -> None:
    """And is tied wherever it can be."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        starter = subprocess.Popen(
            [sys.executable, "-c", BARE_PACKAGE + CHANGED.format(change) + STARTER]
            + [sys.executable, "-c", PARENT + "import time; time.sleep(1000)"],
            stdout=file,
            stderr=file,
        )

    async def main() -> None:
        await until(lambda: CHILD.search(log.read_text()) is not None)
        _, session = map(int, CHILD.findall(log.read_text())[0])
        starter.kill()
        starter.wait()
        if "setpgid" in change:
            await until(lambda: "if it is killed, this process may stay" in log.read_text())
            assert "Traceback" not in log.read_text()
            os.killpg(session, signal.SIGKILL)
        await until(lambda: not orphans.members(session))

    asyncio.run(main())


def test_one_that_never_answers_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck").touch()
    whole = Set(
        tmp_path,
        ALL,
        {"STUCK": str(tmp_path / "stuck")},
        Deployment(model="m", prefill=1, decode=1, start_timeout=0.5),
    )
    monkeypatch.setattr(supervisor, "PROBE", 0.1)
    with pytest.raises(ServeError, match="did not answer within"):
        whole.run(nothing)
    assert whole.left() == []


def test_one_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "UNRESPONSIVE", 2)  # others must not seem to hang
    monkeypatch.setattr(supervisor, "PROBE", 0.2)
    whole = Set(tmp_path, ALL)

    async def stop() -> None:
        first = whole.pid("decode-0")
        os.kill(first, signal.SIGSTOP)
        await until(lambda: whole["decode-0"].ready.is_set() and whole.pid("decode-0") != first)

    whole.run(stop)
    assert any(line.startswith("decode-0 did not answer for") for line in whole.said)
    assert whole.left() == []


def test_one_that_says_it_is_not_well_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the front does while engines are missing."""
    monkeypatch.setattr(supervisor, "UNRESPONSIVE", 1)
    whole = Set(tmp_path, ALL, {"UNWELL": str(tmp_path / "unwell")})

    async def wait() -> None:
        (tmp_path / "unwell").touch()
        await asyncio.sleep(supervisor.UNRESPONSIVE + 0.5)

    whole.run(wait)
    assert [line.split(":")[0] for line in whole.said] == ["stopping"]


@pytest.mark.parametrize(
    ("name", "fallback", "goes_on"),
    [
        ("prefill-0", True, True),
        ("prefill-0", False, False),
        ("decode-0", True, False),
        ("front", True, False),
    ],
)
def test_what_ends_too_often_stays_down(
    tmp_path: Path, name: str, fallback: bool, goes_on: bool
) -> None:
    described = Deployment(
        model="m", prefill=1, decode=1, max_restarts=1, decode_fallback=fallback, drain_timeout=1
    )
    whole = Set(tmp_path, ALL, deployment=described)

    async def kill() -> None:
        seen: set[int] = set()
        while not whole[name].given_up:
            child = whole[name].child
            if child is not None and child.pid not in seen:
                seen.add(child.pid)
                os.kill(child.pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
        assert len(seen) == 2
        await asyncio.sleep(0.2)
        assert whole.supervisor.stopping.is_set() != goes_on

    if goes_on:
        whole.run(kill)
    else:
        with pytest.raises(ServeError, match=f"{name} .* without it nothing can be served"):
            whole.run(kill)
    assert any(f"{name} ended 2 times in a row and stays down" in line for line in whole.said)
    assert whole.left() == []


def test_shared_memory_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    name = f"mixquant-test-{uuid.uuid4().hex}"
    whole = Set(tmp_path, {**ALL, "decode-0": ["memory"]}, {"MEMORY": name})
    path = Path("/dev/shm") / name

    async def kill() -> None:
        await until(lambda: str(path) in whole["decode-0"].mapped)
        os.kill(whole.pid("decode-0"), signal.SIGKILL)
        path_of_first = path.stat().st_ino
        await until(lambda: path.exists() and path.stat().st_ino != path_of_first)

    try:
        whole.run(kill)
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_shared_memory_that_another_one_uses_stays(tmp_path: Path) -> None:
    name = f"mixquant-test-{uuid.uuid4().hex}"
    whole = Set(
        tmp_path, {**ALL, "decode-0": ["memory"], "prefill-0": ["memory"]}, {"MEMORY": name}
    )
    path = Path("/dev/shm") / name

    async def kill() -> None:
        # Both have opened it under one name; which of them made it does not matter.
        await until(lambda: str(path) in whole["decode-0"].mapped & whole["prefill-0"].mapped)
        first = whole.pid("decode-0")
        os.kill(first, signal.SIGKILL)
        await until(lambda: whole["decode-0"].child is None)
        await until(lambda: whole["decode-0"].child is not None)
        assert path.exists()

    try:
        whole.run(kill)
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_memory_is_seen_in_the_maps_of_a_process() -> None:
    block = shm.SharedMemory(create=True, size=4096)
    try:
        assert f"/dev/shm/{block.name}" in orphans.shared_memory([os.getpid()])
        assert orphans.shared_memory([2**30]) == set()
    finally:
        block.close()
        block.unlink()
    assert f"/dev/shm/{block.name}" not in orphans.shared_memory([os.getpid()])
    assert os.getpid() in orphans.members(os.getsid(0))


def test_a_semaphore_is_seen_under_its_name() -> None:
    before = orphans.shared_memory([os.getpid()])
    lock = multiprocessing.get_context("spawn").Lock()
    (found,) = orphans.shared_memory([os.getpid()]) - before
    assert Path(found).exists()
    assert Path(found).name == f"sem.{lock._semlock.name.lstrip('/')}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("starting", [False, True])
def test_shared_memory_made_while_it_is_asked_to_end_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starting: bool
) -> None:
    """As vLLM's while it starts, which SIGTERM does not end."""
    # s, to make it in on a busy machine
    monkeypatch.setattr(supervisor, "ENDING", 2.0)
    monkeypatch.setattr(supervised, "ENDING_EARLY", 2.0)
    name = f"mixquant-test-{uuid.uuid4().hex}"
    environment = {"MEMORY": name}
    if starting:
        (tmp_path / "stuck").touch()
        environment["STUCK"] = str(tmp_path / "stuck")
    whole = Set(tmp_path, {**ALL, "decode-0": ["deaf", "memory-late"]}, environment)
    path = Path("/dev/shm") / name

    async def stop() -> None:
        await until(lambda: whole["decode-0"].starts > 0 and "are set" in whole.log("decode-0"))
        whole.supervisor.stop()

    async def main() -> None:
        await asyncio.gather(whole.supervisor.run(lambda: None), stop())

    try:
        if starting:
            asyncio.run(asyncio.wait_for(main(), PATIENCE))
        else:
            whole.run(nothing)
        assert "mapped" in whole.log("decode-0")
        assert not path.exists()
        assert whole.left() == []
    finally:
        path.unlink(missing_ok=True)


def test_what_still_starts_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "ENDING", 10.0 * PATIENCE)
    (tmp_path / "stuck").touch()
    whole = Set(tmp_path, {**ALL, "decode-0": ["deaf"]}, {"STUCK": str(tmp_path / "stuck")})

    async def main() -> None:
        running = asyncio.ensure_future(whole.supervisor.run(lambda: None))
        await until(lambda: whole["decode-0"].starts > 0 and "are set" in whole.log("decode-0"))
        whole.supervisor.stop()
        await asyncio.wait_for(running, PATIENCE)

    asyncio.run(main())
    assert whole.left() == []


def test_a_second_request_to_stop_does_not_wait(tmp_path: Path) -> None:
    described = Deployment(model="m", prefill=1, decode=1, drain_timeout=1000)
    whole = Set(tmp_path, {**ALL, "front": ["deaf"]}, deployment=described)

    async def stop_twice() -> None:
        whole.supervisor.stop()
        await asyncio.sleep(0.1)

    whole.run(stop_twice)  # which stops it once more, long before the drain is over
    assert whole.left() == []
