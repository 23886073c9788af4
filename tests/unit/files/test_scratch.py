"""Folders of ours: gone with their process, also if it was killed; kept where they are to be kept."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mixquant.files import scratch

MAKES_ONE = (
    "import sys, time; from mixquant.files import scratch; "
    "print(scratch.make('test'), flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, of this test alone; no folder is too young to be swept."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(scratch, "_SETTLED", -1)
    return tmp_path


@contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    process = subprocess.Popen([sys.executable, "-c", MAKES_ONE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_leaves_nothing_for_long(temporary: Path) -> None:
    with another_process() as (process, folder):
        (folder / "large").write_text("x")
        mine = scratch.make("test")
        assert folder.is_dir()  # its process lives
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert folder.is_dir()
        next_one = scratch.make("test")
        assert sorted(temporary.iterdir()) == sorted([mine, next_one])
    for one in (mine, next_one):
        scratch.remove(one)
    assert list(temporary.iterdir()) == []


def test_what_is_kept_or_another_s_or_young_stays(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = scratch.make("test")
    (kept / "log").write_text("why")
    scratch.keep(kept)
    foreign = temporary / "mixquant-test-foreign"  # no mark of ours in it
    foreign.mkdir()
    (temporary / "mixquant-test-link").symlink_to(kept)
    with another_process() as (process, folder):
        process.kill()
        process.wait()
        monkeypatch.setattr(scratch, "_SETTLED", 60)
        scratch.make("test")
        assert folder.is_dir()
        os.utime(folder, (time.time() - 61, time.time() - 61))
        scratch.make("test")
        assert not folder.exists()
    assert (kept / "log").read_text() == "why"
    assert list(kept.iterdir()) == [kept / "log"]
    assert foreign.is_dir()


def test_names_cannot_be_guessed_and_folders_are_the_user_s_alone() -> None:
    one, other = scratch.make("test"), scratch.make("test")
    assert one != other
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
