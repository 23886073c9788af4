"""The answers of one arm to one benchmark: a file that only grows, so a killed run loses nothing.

The first line holds the configuration that the answers belong to. Each other line is an answer, or
the error of a question without one. A verdict is in the line of its answer, or, if a judge gave it
later, in a line of its own. The last line of an (item, seed) counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mixquant.errors import MixquantError
from mixquant.evaluate.benchmarks.chat import Usage
from mixquant.evaluate.tasks import Answer, Verdict
from mixquant.files.reading import shown

VERSION = 1

Key = tuple[str, int]  # item, seed


class AnswerFileError(MixquantError, ValueError):
    """A file of answers that cannot be continued. The message is one line."""


@dataclass(frozen=True)
class Entry:
    """What the file knows about one (item, seed)."""

    answer: Answer | None  # None: the request failed
    usage: Usage
    error: str | None = None  # why there is no answer, or no verdict
    verdict: Verdict | None = None
    judge: str | None = None  # the model that gave the verdict, if one did


class _Line(BaseModel):
    """One line after the first. Without ``usage``, the line is about the answer before it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    item: str
    seed: int
    answer: dict[str, Any] | None = None
    usage: Usage | None = None
    error: Any
    verdict: Verdict | None = None
    judge: str | None = None


class AnswerFile:
    """Reads a file of answers, and appends to it.

    A last line that a kill tore is dropped. Nothing is written before the first answer.

    Args:
        path: need not exist.
        configuration: JSON; what answers must have in common to be in one file.

    Raises:
        AnswerFileError: the file has another configuration or is no file of answers.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: dict[Key, Entry] = {}
        self._configuration = json.loads(json.dumps(configuration))
        self._file: RawIOBase | None = None
        self._length = 0  # bytes of complete lines
        self._read()

    def add(self, key: Key, entry: Entry) -> None:
        """Appends the outcome of an (item, seed), and keeps it even if the process is killed next."""
        known = self.entries.get(key)
        line: dict[str, Any] = {"item": key[0], "seed": key[1]}
        if known is None or known.answer is None or known.answer != entry.answer:
            line |= {"answer": entry.answer, "usage": asdict(entry.usage)}
        line["error"] = entry.error
        if entry.verdict is not None:
            line |= {"verdict": asdict(entry.verdict), "judge": entry.judge}
        self._append(line)
        self.entries[key] = entry

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
                self._file.truncate(self._length)
                if not self._length:
                    header = {"mixquant": "answers", "version": VERSION}
                    self._write(self._file, {**header, "configuration": self._configuration})
            self._write(self._file, line)
        except OSError as error:
            raise AnswerFileError(
                f"cannot write {self.path}: {error.strerror or error}; what it holds is kept"
            ) from None

    def _write(self, file: RawIOBase, values: Mapping[str, Any]) -> None:
        # ASCII, so that no character can be taken for the end of a line.
        line = json.dumps(values).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(self._length)
            raise
        self._length += len(line)

    def _read(self) -> None:
        try:
            lines = self._whole_lines(self.path.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise AnswerFileError(f"cannot read {self.path}: {error.strerror or error}") from None
        header = next(lines, None)
        if header is None:
            return
        if header.get("mixquant") != "answers" or header.get("version") != VERSION:
            raise AnswerFileError(
                f"{self.path} is not a file of answers of this version of mixquant; "
                "give another --out"
            )
        if changed := first_difference(header.get("configuration"), self._configuration):
            raise AnswerFileError(
                f"{self.path} holds answers of another configuration: {changed}; "
                "give the options that it was started with, or another --out"
            )
        for number, line in enumerate(lines, 2):
            try:
                self._take(_Line.model_validate(line))
            except (KeyError, ValidationError):
                raise AnswerFileError(f"{self.path} is damaged: line {number}") from None

    def _whole_lines(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._length = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._length].split(b"\n")[:-1], 1):
            try:  # not `parse_json`, which refuses lone surrogates, and a model may have written one
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                raise AnswerFileError(f"{self.path} is damaged: line {number} is not a JSON object")
            yield values

    def _take(self, line: _Line) -> None:
        key = (line.item, line.seed)
        entry = self.entries[key] if line.usage is None else Entry(line.answer, line.usage)
        entry = replace(entry, error=line.error)
        if line.verdict is not None:
            entry = replace(entry, verdict=line.verdict, judge=line.judge)
        self.entries[key] = entry


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first difference between two JSON values, in words; None if there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            path = f"{name}.{key}" if name else key
            if changed := first_difference(before.get(key), now.get(key), path):
                return changed
        return None
    if before == now:
        return None
    return f"{name} was {_short(before)}, and is {_short(now)}"


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return shown(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
