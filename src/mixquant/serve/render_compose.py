"""Renders a deployment as a Docker Compose file: the whole set on one machine.

Keys are those of the Compose Specification.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
from typing import Any

from mixquant._version import __version__
from mixquant.serve.addresses import LOOPBACK
from mixquant.serve.commands import Process
from mixquant.serve.containers import (
    CACHE,
    DOCKERFILE,
    PROBE_SECONDS,
    WHEEL,
    alone,
    as_yaml,
    folders,
    grace_seconds,
    health_command,
    in_containers,
    is_engine,
    needs_hub,
)
from mixquant.serve.description import Deployment, ServeError

_OWN_IMAGE = f"mixquant-vllm:{__version__}"

# The engines share the machine's IPC namespace, which NVLink between containers needs.
_IPC = "host"


def render(deployment: Deployment, image: str | None = None) -> str:
    """The file's text.

    Args:
        image: holds vLLM, mixquant and, for a disaggregated set, NIXL and the router. None: one that
            Compose builds from vLLM's own.

    Raises:
        ServeError: something in the description does not hold in containers.
    """
    set_of = in_containers(deployment, alone)
    document: dict[str, Any] = {
        "name": "mixquant",
        "services": {
            process.name: _escaped(_service(deployment, process, image or _OWN_IMAGE))
            for process in set_of
        },
        "volumes": {"cache": {}},
    }
    if image is None:
        for service in document["services"].values():
            service["pull_policy"] = "never"
        first = document["services"][set_of[0].name]
        first["build"] = _escaped({"context": ".", "dockerfile_inline": DOCKERFILE})
    if secrets := {secret for process in set_of for secret in process.secrets.values()}:
        document["secrets"] = {
            secret: _source(deployment) if secret == "api-key" else {"file": "./engine-key"}
            for secret in sorted(secrets)
        }
    steps = []
    if image is None:
        steps += [f"With {WHEEL} beside this file:", "docker compose build"]
    if deployment.disaggregated:
        steps.append("(umask 077; openssl rand -hex 32 > engine-key)")
    return as_yaml([document], "\n".join([*steps, "docker compose up --detach --wait"]))


def _service(deployment: Deployment, process: Process, image: str) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": image,
        "hostname": process.name,
        "init": True,
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "stop_grace_period": f"{grace_seconds(deployment)}s",
        "entrypoint": _entrypoint(process),
        "command": list(process.argv),
        "healthcheck": {
            "test": ["CMD", *health_command(process)],
            "interval": f"{PROBE_SECONDS}s",
            "timeout": f"{PROBE_SECONDS}s",
            "retries": 3,
            "start_period": f"{deployment.start_timeout:.0f}s",
        },
        "logging": {"driver": "json-file", "options": {"max-size": "100m", "max-file": "3"}},
    }
    if process.environment:
        service["environment"] = dict(process.environment)
    if process.secrets:
        service["secrets"] = sorted(set(process.secrets.values()))
    if process.after:
        service["depends_on"] = {name: {"condition": "service_healthy"} for name in process.after}
    if process.role in ("front", "colocated"):
        published = {"target": process.address.port, "published": str(deployment.port)}
        service["ports"] = [{**published, "host_ip": _address(deployment), "protocol": "tcp"}]
    if process.role == "front" and deployment.metrics_port is not None:
        metrics = {"target": process.address.metrics, "published": str(deployment.metrics_port)}
        service["ports"].append({**metrics, "host_ip": LOOPBACK, "protocol": "tcp"})
    if is_engine(process):
        _add_engine(service, deployment, process)
    return service


def _add_engine(service: dict[str, Any], deployment: Deployment, process: Process) -> None:
    service["ipc"] = _IPC
    service["volumes"] = [
        {"type": "volume", "source": "cache", "target": CACHE},
        *(
            {"type": "bind", "source": folder, "target": folder, "read_only": True}
            for folder in folders(deployment)
        ),
    ]
    if needs_hub(deployment):
        service.setdefault("environment", {})["HF_TOKEN"] = None  # the value where Compose runs
    device: dict[str, Any] = {"driver": "nvidia", "capabilities": ["gpu"]}
    if process.role in ("prefill", "decode"):
        gpus = deployment.gpus_of(process.role, int(process.name.rpartition("-")[2]))
        device["device_ids"] = [str(gpu) for gpu in gpus]
    else:
        device["count"] = deployment.tensor_parallel_size
    service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}


def _entrypoint(process: Process) -> list[str]:
    """Puts the secrets into the environment of the command, so no manifest and no argv holds them."""
    steps = ["set -e"]
    for variable, secret in process.secrets.items():
        file = f"/run/secrets/{secret}"
        steps.append(f"export {variable}=; {variable}=$(cat {file})")
        steps.append(f": ${{{variable}:?{shlex.quote(file + ' is empty')}}}")
    return ["/bin/sh", "-c", "; ".join([*steps, 'exec "$0" "$@"'])]


def _source(deployment: Deployment) -> dict[str, str]:
    if deployment.api_key_file is not None:
        return {"file": os.path.abspath(deployment.api_key_file)}
    return {"environment": deployment.api_key_variable or ""}


def _address(deployment: Deployment) -> str:
    host = "127.0.0.1" if deployment.host == "localhost" else deployment.host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise ServeError(
            f"host: Compose publishes a port at an IP address, such as 127.0.0.1; got {host!r}"
        ) from None


def _escaped(value: Any) -> Any:
    """The text with every dollar sign doubled: Compose would read a variable after a single one."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return value
