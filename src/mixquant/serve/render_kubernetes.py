"""Renders a deployment as Kubernetes objects: a StatefulSet for each role, front and routers in one
pod.

Each pod of an engine has its own name, by which the routers find it. The routers listen on the
loopback address of the front's pod, because they check no key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixquant.serve.addresses import Address
from mixquant.serve.commands import DIRECT_ROUTER, TRANSFER_ROUTER, Process
from mixquant.serve.containers import (
    CACHE,
    PORT,
    PROBE_SECONDS,
    alone,
    as_yaml,
    folders,
    grace_seconds,
    health_command,
    in_containers,
    is_engine,
    needs_hub,
    start_probes,
)
from mixquant.serve.description import Deployment, ServeError

APP_NAME = "mixquant"
_KEYS = "mixquant-keys"  # the Secret that the user creates
_SHARED_MEMORY = "16Gi"  # at most: the data that the processes of one engine hand each other
_MODEL_CACHE = "200Gi"

_IN_THE_FRONTS_POD = {
    "front": Address("0.0.0.0", "127.0.0.1", PORT, 0, 29000),
    TRANSFER_ROUTER: Address("127.0.0.1", "127.0.0.1", PORT + 1, 0, 29001),
    DIRECT_ROUTER: Address("127.0.0.1", "127.0.0.1", PORT + 2, 0, 29002),
}


def render(deployment: Deployment, image: str | None = None) -> str:
    """The manifest's text.

    Args:
        image: holds vLLM, mixquant and, for a disaggregated set, NIXL and the router.

    Raises:
        ServeError: no image is given, or something in the description does not hold in containers.
    """
    if image is None:
        raise ServeError(
            "Kubernetes needs the name of an image that holds vLLM and mixquant: --image NAME "
            "(docs/guide/containers.md says how to build one)"
        )
    set_of = in_containers(deployment, lambda name: _address(deployment, name))
    engines = [process for process in set_of if is_engine(process)]
    objects: list[dict[str, Any]] = []
    for role in dict.fromkeys(process.role for process in engines):
        of_role = [process for process in engines if process.role == role]
        objects += _engines(deployment, of_role, image)
    others = [process for process in set_of if not is_engine(process)]
    if others:
        objects += [_front(deployment, others, image), _network_policy()]
    objects.append(_public_service(deployment, "front" if others else engines[0].role))
    return as_yaml(objects, _introduction(deployment, set_of))


def _introduction(deployment: Deployment, set_of: list[Process]) -> str:
    lines = []
    secrets = {secret for process in set_of for secret in process.secrets.values()}
    if secrets:
        sources = {"engine-key": "$(openssl rand -hex 32)", "api-key": "$KEY"}
        if deployment.api_key_variable:
            sources["api-key"] = f"${deployment.api_key_variable}"
        elif deployment.api_key_file:
            sources["api-key"] = f"$(cat {deployment.api_key_file})"
        given = "".join(
            f' \\\n        --from-literal="{secret}={sources[secret]}"'
            for secret in sorted(secrets)
        )
        lines += ["Before the first time:", f"    kubectl create secret generic {_KEYS}{given}"]
        lines += ["A gated model needs the hub's token in the same Secret, as hf-token.", ""]
    lines.append(f"Reach it with: kubectl port-forward service/{APP_NAME} {deployment.port}")
    return "\n".join(lines)


def _address(deployment: Deployment, name: str) -> Address:
    if name in _IN_THE_FRONTS_POD:
        address = _IN_THE_FRONTS_POD[name]
        if name != "front" or deployment.metrics_port is None:
            return address
        taken = {port for one in _IN_THE_FRONTS_POD.values() for port in (one.port, one.metrics)}
        if deployment.metrics_port in taken - {address.metrics}:
            raise ServeError(
                f"metrics_port: {deployment.metrics_port} is a port of the front's pod already; give "
                f"another one than {', '.join(map(str, sorted(taken - {address.metrics})))}"
            )
        return replace(address, metrics=deployment.metrics_port)
    role, _, number = name.rpartition("-")
    return alone(f"{APP_NAME}-{name}.{APP_NAME}-{role}" if number.isdigit() else APP_NAME)


def _labels(role: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": APP_NAME, "app.kubernetes.io/component": role}


def _engines(deployment: Deployment, engines: list[Process], image: str) -> list[dict[str, Any]]:
    """A StatefulSet of engines that differ only by the names of their pods, and the Service of
    these names."""
    first, name = engines[0], f"{APP_NAME}-{engines[0].role}"
    gpus = {"nvidia.com/gpu": deployment.tensor_parallel_size}
    container = _container(first, image) | {"resources": {"limits": gpus}}
    probe = {"httpGet": {"path": first.health, "port": "http"}, "timeoutSeconds": PROBE_SECONDS}
    probe["periodSeconds"] = PROBE_SECONDS
    container["startupProbe"] = {**probe, "failureThreshold": start_probes(deployment)}
    container["readinessProbe"] = {**probe, "failureThreshold": 1}
    container["livenessProbe"] = {**probe, "failureThreshold": 6}
    container["volumeMounts"] = [
        {"name": "cache", "mountPath": CACHE},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    memory = {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": memory}]
    for number, folder in enumerate(folders(deployment)):
        model = f"model-{number}"
        volumes.append({"name": model, "hostPath": {"path": folder, "type": "Directory"}})
        container["volumeMounts"].append({"name": model, "mountPath": folder, "readOnly": True})
    if needs_hub(deployment):
        token = {"name": _KEYS, "key": "hf-token", "optional": True}
        container["env"].append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
    claim = {
        "metadata": {"name": "cache"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": _MODEL_CACHE}},
        },
    }
    labels = _labels(first.role)
    ports = [{"name": use, "port": port, "targetPort": use} for use, port in first.ports.items()]
    return [
        _object("v1", "Service", name, labels)
        | {
            # Routers look names up before the engines are ready, and while one restarts.
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": labels,
                "ports": ports,
            }
        },
        _object("apps/v1", "StatefulSet", name, labels)
        | {
            "spec": {
                "serviceName": name,
                "replicas": len(engines),
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": labels},
                "template": _pod(deployment, labels, [container], volumes),
                "volumeClaimTemplates": [claim],
            }
        },
    ]


def _front(deployment: Deployment, others: list[Process], image: str) -> dict[str, Any]:
    containers = []
    for process in others:
        container = _container(process, image)
        if process.role == "front":
            probe: dict[str, Any] = {"httpGet": {"path": process.health, "port": "http"}}
        else:
            probe = {"exec": {"command": health_command(process)}}
            del container["ports"]  # of the loopback address
        times = {"periodSeconds": PROBE_SECONDS, "timeoutSeconds": PROBE_SECONDS}
        container["readinessProbe"] = probe | times
        containers.append(container)
    labels = _labels("front")
    return _object("apps/v1", "Deployment", f"{APP_NAME}-front", labels) | {
        "spec": {
            # One: two would not know each other's load and sessions.
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": _pod(deployment, labels, containers, []),
        }
    }


def _container(process: Process, image: str) -> dict[str, Any]:
    env: list[dict[str, Any]] = []
    for variable, value in process.environment.items():
        if variable == "VLLM_NIXL_SIDE_CHANNEL_HOST":
            # The engine also listens on it, so it has to be an address of the pod.
            address = {"fieldRef": {"fieldPath": "status.podIP"}}
            env.append({"name": variable, "valueFrom": address})
        else:
            env.append({"name": variable, "value": _escaped(value)})
    for variable, secret in process.secrets.items():
        source = {"secretKeyRef": {"name": _KEYS, "key": secret}}
        env.append({"name": variable, "valueFrom": source})
    return {
        "name": process.name if not is_engine(process) else "engine",
        "image": image,
        "command": [_escaped(one) for one in process.argv],
        "env": env,
        "ports": [{"name": use, "containerPort": port} for use, port in process.ports.items()],
        "securityContext": {"allowPrivilegeEscalation": False},
    }


def _pod(
    deployment: Deployment,
    labels: dict[str, str],
    containers: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        # Otherwise vLLM, which reads VLLM_*, could take the address of a Service for a setting.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds(deployment),
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": containers,
    }
    if volumes:
        spec["volumes"] = volumes
    return {"metadata": {"labels": labels}, "spec": spec}


def _network_policy() -> dict[str, Any]:
    """Lets only the pods of this set connect to engines: NIXL checks no key and uses any port."""
    engines = {
        "matchLabels": {"app.kubernetes.io/name": APP_NAME},
        "matchExpressions": [
            {
                "key": "app.kubernetes.io/component",
                "operator": "In",
                "values": ["prefill", "decode"],
            }
        ],
    }
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": APP_NAME}}}
    labels = {"app.kubernetes.io/name": APP_NAME}
    return _object("networking.k8s.io/v1", "NetworkPolicy", f"{APP_NAME}-engines", labels) | {
        "spec": {
            "podSelector": engines,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [ours]}],
        }
    }


def _public_service(deployment: Deployment, role: str) -> dict[str, Any]:
    ports = [{"name": "http", "port": deployment.port, "targetPort": "http"}]
    labels = _labels(role)
    return _object("v1", "Service", APP_NAME, labels) | {
        "spec": {"type": "ClusterIP", "selector": labels, "ports": ports}
    }


def _object(version: str, kind: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": dict(labels)},
    }


def _escaped(text: str) -> str:
    """The text with ``$(`` doubled: Kubernetes would read a variable's name after a single one."""
    return text.replace("$(", "$$(")
