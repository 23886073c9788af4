"""The work that a run has done, in a folder, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mixquant.errors import MixquantError
from mixquant.files.folders import LOCK, make_folder
from mixquant.files.reading import ReadingError, parse_json


class WorkError(MixquantError, ValueError):
    """A folder that cannot be used. The message is one line."""


class Work:
    """Numbers and arrays by name, each computed once for a folder.

    Files are written whole or not at all. What they are the work of is written beside them, and a
    folder of other work is refused.
    """

    def __init__(self, folder: Path, what: Mapping[str, object]) -> None:
        """Opens a folder, or makes it.

        Args:
            what: the work depends on, as JSON types.

        Raises:
            FolderError: the folder cannot be made.
            WorkError: it cannot be written to, or holds other work.
        """
        self._folder = folder
        self._numbers: dict[str, float] = {}
        wanted = json.loads(json.dumps(what))
        make_folder(folder, "--work")
        try:
            about = folder / "about.json"
            if about.exists():
                found = parse_json(about.read_text(encoding="utf-8"))
                if found != wanted:
                    raise WorkError(
                        f"{folder} holds the work of another run, which differs in "
                        f"{_different(found, wanted)}; remove it, or name another folder with --work"
                    )
            else:
                if any(one.name != LOCK for one in folder.iterdir()):
                    raise WorkError(
                        f"{folder} holds other files; name an empty or new folder with --work"
                    )
                self._write("about.json", json.dumps(wanted, indent=2).encode())
            numbers = folder / "numbers.json"
            if numbers.exists():
                self._numbers = parse_json(numbers.read_text(encoding="utf-8"))
        except OSError as error:
            raise WorkError(f"cannot write {folder}: {error.strerror or error}") from None
        except (UnicodeDecodeError, ReadingError) as error:
            raise WorkError(f"cannot read {folder}: {error}; remove it") from None

    def number(self, name: str, compute: Callable[[], float]) -> float:
        """The number of this name."""
        if name not in self._numbers:
            self._numbers[name] = compute()
            self._write("numbers.json", json.dumps(self._numbers, indent=2).encode())
        return self._numbers[name]

    def has(self, name: str) -> bool:
        return name in self._numbers

    def array(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of this name."""
        file = self._folder / f"{name}.npy"
        if not file.exists():
            made = compute()
            temporary = self._folder / f".{name}.npy"
            with temporary.open("wb") as opened:
                np.save(opened, made)
            os.replace(temporary, file)
            return made
        try:
            read: np.ndarray = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise WorkError(f"cannot read {file}: {reason or error}; remove it") from None
        return read

    def _write(self, name: str, content: bytes) -> None:
        temporary = self._folder / f".{name}"
        temporary.write_bytes(content)
        os.replace(temporary, self._folder / name)


_SAID = {
    "mixquant": "mixquant's version",
    "model": "the model",
    "config": "the model",
    "weights": "the model's weights",
    "formats": "the target",
    "plain": "the target",
    "texts": "the texts searched on",
    "prefill_model": "the prefill model",
}


def _different(found: object, wanted: Mapping[str, object]) -> str:
    if not isinstance(found, dict):
        return "about.json"
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return " and ".join(dict.fromkeys(_SAID.get(name, name) for name in names))
