"""What both manifests share: each process of a deployment runs in a container of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mixquant._version import __version__
from mixquant.serve.addresses import Address
from mixquant.serve.commands import Process, processes
from mixquant.serve.description import Deployment, ServeError

PYTHON = "python3"  # of the image
CACHE = "/cache"  # files of the hub, and compiled code of vLLM, whatever user the image runs as
PORT, SIDE_CHANNEL, METRICS = 8000, 5600, 29000
PROBE_SECONDS = 10

WHEEL = f"mixquant-{__version__}-py3-none-any.whl"

# vLLM's own image, in which NIXL and CUDA fit together, and the packages that it lacks. It has `uv`.
DOCKERFILE = f"""\
FROM vllm/vllm-openai:v0.32.0
COPY {WHEEL} /tmp/
RUN uv pip install --system 'mixquant[serve] @ file:///tmp/{WHEEL}' vllm==0.32.0 \\
 && uv pip install --system --no-deps nixl
"""


def in_containers(deployment: Deployment, address: Callable[[str], Address]) -> list[Process]:
    """The processes of a deployment, each with a container's GPUs, which are numbered from 0.

    Raises:
        ServeError: a checkpoint is a directory without a path that holds elsewhere, too.
    """
    for name in _checkpoints(deployment):
        if not os.path.isabs(name) and os.path.isdir(name):
            raise ServeError(f"{name} is a directory: in containers it needs its absolute path")
    return [
        replace(process, environment={"XDG_CACHE_HOME": CACHE, **process.environment})
        if is_engine(process)
        else process
        for process in processes(deployment, address, python=PYTHON, gpus=())
    ]


def alone(host: str) -> Address:
    """The address of a process in its own container, which the others reach by this name."""
    return Address("0.0.0.0", host, PORT, SIDE_CHANNEL, METRICS)


def folders(deployment: Deployment) -> list[str]:
    """Directories of checkpoints; engines see them at the same paths."""
    return [name for name in _checkpoints(deployment) if os.path.isabs(name)]


def needs_hub(deployment: Deployment) -> bool:
    return len(folders(deployment)) < len(_checkpoints(deployment))


def is_engine(process: Process) -> bool:
    return process.role in ("colocated", "prefill", "decode")


def health_command(process: Process) -> list[str]:
    """A command that fails unless the process in the same container can serve."""
    url = f"http://127.0.0.1:{process.health_port}{process.health}"
    return [PYTHON, "-c", f"import urllib.request as u; u.urlopen({url!r}, timeout=5)"]


def start_probes(deployment: Deployment) -> int:
    """How many probes, `PROBE_SECONDS` apart, may fail while an engine starts."""
    return math.ceil(deployment.start_timeout / PROBE_SECONDS)


def grace_seconds(deployment: Deployment) -> int:
    """Seconds from SIGTERM to SIGKILL."""
    return math.ceil(deployment.drain_timeout) + 30


def as_yaml(documents: list[dict[str, Any]], introduction: str) -> str:
    """YAML documents, with the introduction above them as comments."""
    import yaml

    lines = [f"Written by mixquant {__version__} (mixquant serve --render).", ""]
    lines += introduction.splitlines()
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comments + yaml.safe_dump_all(documents, sort_keys=False, width=math.inf)


def _checkpoints(deployment: Deployment) -> list[str]:
    prefill = deployment.chosen_recipe().prefill_model
    return [deployment.model, *([prefill] if prefill else [])]
