"""The data of benchmarks: from a user's file or from the Hub, each record checked."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mixquant.evaluate.tasks import TaskError
from mixquant.files.reading import ReadingError, parse_json


class DataRecord(BaseModel):
    """One record of a data file. Fields that a benchmark does not need are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


R = TypeVar("R", bound=DataRecord)


def read_records(path: Path, schema: type[R]) -> list[R]:
    """All records of a JSON, JSON Lines, CSV or Parquet file.

    Raises:
        TaskError: the file cannot be read, is empty, or a record does not fit the schema.
    """
    records = [_checked(values, schema, where) for where, values in _raw(path)]
    if not records:
        raise TaskError(f"{path} holds no record")
    return records


def records_from_hub(repository: str, split: str, schema: type[R], subset: str = "") -> list[R]:
    """All records of a split of a data set on the Hub.

    Raises:
        TaskError: it cannot be had, or a record does not fit the schema.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            "loading from the Hub needs datasets: pip install 'mixquant[eval]'; or give --data FILE"
        ) from None
    try:
        rows = list(load_dataset(repository, subset or None, split=split))
    except Exception as error:  # many classes: there are many ways to be offline
        raise _unreachable(repository, error) from None
    return [
        _checked(row, schema, f"{repository}, split {split}, row {number}")
        for number, row in enumerate(rows, 1)
    ]


def file_from_hub(repository: str, name: str) -> Path:
    """A file of a data set on the Hub, in the local cache.

    Raises:
        TaskError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:
        raise _unreachable(f"{repository}/{name}", error) from None


def unique(ids: list[str], source: Path | None) -> None:
    """Refuses ids that appear twice: a resumed run would take one item's answer for another's.

    Raises:
        TaskError: which one.
    """
    seen: set[str] = set()
    for number, name in enumerate(ids, 1):
        if name in seen:
            raise TaskError(f"{source or 'the data'}: record {number}: id {name!r} is there twice")
        seen.add(name)


def _unreachable(what: str, error: Exception) -> TaskError:
    reason = " ".join(str(error).split())[:120]
    return TaskError(
        f"cannot load {what} from the Hub ({type(error).__name__}: {reason}): connect, or give its "
        "file with --data"
    )


def _checked(values: Any, schema: type[R], where: str) -> R:
    if not isinstance(values, Mapping):
        raise TaskError(f"{where}: expected an object, found {type(values).__name__}")
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        message = first["msg"].removeprefix("Value error, ")
        raise TaskError(f"{where}: field {field!r}: {message}") from None


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    """Records and where they stand, for messages."""
    if os.path.isdir(path):
        raise TaskError(f"cannot read {path}: it is a directory, expected a file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TaskError(f"cannot read {path}: it is not UTF-8 text") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            columns = reader.fieldnames or ()
            if twice := [name for name in columns if columns.count(name) > 1]:
                raise TaskError(f"{path}: the column {twice[0]!r} appears twice")
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
        except csv.Error as error:  # a field of over 128 KiB, an open quote
            raise TaskError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    elif text.lstrip().startswith("["):
        yield from _array(path, text)
    else:
        # Not str.splitlines: JSON strings may hold U+2028 and its like.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, parse_json(line)
                except ReadingError as error:
                    raise TaskError(f"{where}: not JSON: {error}") from None


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        values = parse_json(text)
    except ReadingError as error:
        raise TaskError(f"{path}: not JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield f"{path}, record {number}", value


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise TaskError(f"{path}: Parquet needs pyarrow: pip install 'mixquant[eval]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise TaskError(f"cannot read {path}: not a Parquet file ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row
