"""The terminal, and the files that users name."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from mixquant.errors import MixquantError

out = Console()
err = Console(stderr=True, highlight=False)


class InputError(MixquantError, ValueError):
    """An argument, option or file that cannot be used. The message is one line."""


def say(message: str) -> None:
    err.print(message, style="dim", soft_wrap=True, markup=False)


def print_error(message: str) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Checks, before long work, that a file can be written after it."""
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a directory")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails if the name is too long
        if not _is_special(path):
            with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".mixquant-"):
                pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file in full or not at all. Writes to a device or a pipe directly."""
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_results(path: Path, text: str) -> None:
    """`write_whole` for the result of long work: if it fails, the text is kept in the temporary
    folder."""
    try:
        write_whole(path, text)
    except InputError as error:
        try:
            handle, kept = tempfile.mkstemp(prefix="mixquant-", suffix=path.suffix)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            raise error from None
        raise InputError(f"{error}; it is kept in {kept}") from None


def write_so_far(path: Path, text: str) -> None:
    """`write_whole` for unfinished work: if it fails, a message says so, and the work goes on."""
    try:
        write_whole(path, text)
    except InputError as error:
        say(str(error))


def _is_special(path: Path) -> bool:
    """Whether the path exists and is not a regular file, so that no file may replace it."""
    return os.path.exists(path) and not os.path.isfile(path)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".mixquant-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are for the owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
