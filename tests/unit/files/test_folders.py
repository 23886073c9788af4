"""A folder that one process at a time writes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mixquant.files.folders import FolderError, alone_in

HOLDS = """
import sys
from pathlib import Path
from mixquant.files.folders import alone_in

with alone_in(Path(sys.argv[1]), "--out"):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_lets_others_in(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        with (
            pytest.raises(FolderError, match=r"another process writes to .*give another --out$"),
            alone_in(folder, "--out"),
        ):
            pass
        process.kill()
    for _ in range(2):
        with alone_in(folder, "--out"):
            pass


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(FolderError, match="a file is in its place; name a directory with --out"),
            alone_in(folder, "--out"),
        ):
            pass
