"""The tensors of a checkpoint's safetensors files, by name, and the directory that holds them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.models import HUB_NAME
from mixquant.errors import one_line
from mixquant.files.reading import ReadingError, parse_json, shown


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    weight_map: dict[str, str]  # the file of each tensor


class TensorFiles:
    """The tensors of a directory's safetensors files, by name. Files are opened on first use.

    Raises:
        CheckpointError: (here and in `get`) a file is missing or damaged.
    """

    def __init__(self, source: str, directory: Path) -> None:
        self.source = source
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for file in self._list(directory):
            for name in self._handle(file).keys():  # noqa: SIM118 (it is no dict)
                self._files[name] = file
        self.names = self._files.keys()

    def shape(self, name: str) -> list[int]:
        return list(self._handle(self._files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it: ``BF16``, ``F8_E4M3``, ``U8``, ..."""
        return str(self._handle(self._files[name]).get_slice(name).get_dtype())

    def get(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """A tensor, or some of its rows; other rows are not read."""
        handle = self._handle(self._files[name])
        try:
            if rows is None:
                return handle.get_tensor(name)
            part = handle.get_slice(name)
            return torch.cat([part[row : row + 1] for row in rows])
        except (OSError, SafetensorError) as error:
            raise self._unreadable(self._files[name], error) from error

    def _list(self, directory: Path) -> list[Path]:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            # Only the files that it names: some repositories hold the same weights twice.
            try:
                names = set(
                    _Index.model_validate(parse_json(index.read_bytes())).weight_map.values()
                )
            except ValidationError as error:
                raise self._unreadable(index, ReadingError(first_error(error))) from None
            except (OSError, ReadingError) as error:
                raise self._unreadable(index, error) from error
            return [directory / name for name in sorted(names)]
        if (single := directory / "model.safetensors").is_file():
            return [single]
        if not (files := sorted(directory.glob("*.safetensors"))):
            raise CheckpointError(f"{self.source} holds no safetensors files")
        return files

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:  # ValueError: a NUL in the name
                raise self._unreadable(file, error) from error
        return self._handles[file]

    def _unreadable(self, file: Path, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read {file.name[:100]} of {self.source}: {one_line(error)}")


def directory_of(source: str, revision: str | None = None) -> Path:
    """The directory that a source stands for; downloads a hub name's files.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(os.path.expanduser(source))
    if source and os.path.isdir(path):
        return path
    if os.path.exists(path) or not HUB_NAME.fullmatch(source):
        raise CheckpointError(f"{shown(source)} is not a checkpoint: there is no such directory")
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": ["*.json", "*.safetensors"]}
    try:
        # Downloads retry for half a minute; a mistyped path must fail sooner.
        HfApi().model_info(source, revision=revision, timeout=10)
        return Path(snapshot_download(source, **wanted))
    except Exception as error:  # many classes: no such model, gated, offline, no network
        try:
            return Path(snapshot_download(source, **wanted, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"{source} is not a checkpoint: there is no such directory, and it cannot be downloaded "
                f"from the Hugging Face Hub ({one_line(error)})"
            ) from error


def first_error(error: ValidationError) -> str:
    """The first of the errors: which field, what was expected, and what is there."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where[:200]}: {first['msg']}, got {shown(first['input'])}"
