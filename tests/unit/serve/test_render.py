"""`mixquant serve --render`: manifests that the tools' own schemas accept, and that run the same set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import REPOSITORY

from mixquant import cli
from mixquant.serve import render_compose, render_kubernetes
from mixquant.serve.commands import Process, processes
from mixquant.serve.containers import DOCKERFILE, METRICS, PYTHON, WHEEL, alone, is_engine
from mixquant.serve.description import Deployment, ServeError

yaml = pytest.importorskip("yaml")
DOCS = REPOSITORY / "docs"
IMAGE = "registry.example/mixquant:1"
KEY = "a-key-that-must-not-leak"

SET: dict[str, Any] = {"model": "Qwen/Qwen3-8B", "prefill": 2, "decode": 1}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "colocated": {"model": "Qwen/Qwen3-8B"},
    "colocated with a key": {"model": "Qwen/Qwen3-8B", "api_key_variable": "KEY", "port": 80},
    "a set": SET,
    "a set with everything": {
        **SET,
        "model": "/models/Qwen3-8B",
        "served_model_name": "qwen3",
        "recipe": {"preset": "fast", "prefill_model": "/models/Qwen3-8B-NVFP4"},
        "tensor_parallel_size": 2,
        "prefill_gpus": "4,5,6,7",
        "decode_gpus": "0,1",
        "host": "0.0.0.0",
        "port": 9000,
        "api_key_file": "keys/clients",
        "vllm_arguments": "--max-model-len 32768 --chat-template '{{ $x }} $(y) ${z}'",
        "prefill_arguments": "--max-num-batched-tokens 8192",
        "environment": {"UCX_TLS": "all", "PRICE": "$5"},
        "min_transfer_tokens": 0,
        "decode_fallback": False,
        "start_timeout": 60.5,
    },
}


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return Deployment.from_values(DEPLOYMENTS[request.param])


def compose(deployment: Deployment, image: str | None = IMAGE) -> dict[str, Any]:
    document = yaml.safe_load(render_compose.render(deployment, image))
    assert isinstance(document, dict)
    return document


def kubernetes(deployment: Deployment) -> dict[tuple[str, str], dict[str, Any]]:
    """Objects by kind and name."""
    documents = list(yaml.safe_load_all(render_kubernetes.render(deployment, IMAGE)))
    objects = {(one["kind"], one["metadata"]["name"]): one for one in documents}
    assert len(objects) == len(documents)
    return objects


def pods(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pods' specifications, by the names of what makes them."""
    return {
        name: one["spec"]["template"]["spec"]
        for (kind, name), one in objects.items()
        if kind in ("StatefulSet", "Deployment")
    }


def interpolated(value: Any) -> Any:
    """What Compose makes of a value: no variable may be left in it."""
    if isinstance(value, dict):
        return {key: interpolated(one) for key, one in value.items()}
    if isinstance(value, list):
        return [interpolated(one) for one in value]
    if isinstance(value, str):
        assert "$" not in value.replace("$$", ""), value
        return value.replace("$$", "$")
    return value


def wanted_secrets(deployment: Deployment) -> set[str]:
    wanted = {"engine-key": deployment.disaggregated, "api-key": deployment.has_key}
    return {name for name, is_wanted in wanted.items() if is_wanted}


# --- the tools' own schemas --------------------------------------------------------------------------


@pytest.mark.parametrize("image", [None, IMAGE])
def test_composes_schema_accepts_it(
    deployment: Deployment, image: str | None, tmp_path: Path
) -> None:
    command = pytest.importorskip("check_jsonschema").main
    file = tmp_path / "compose.yaml"
    file.write_text(render_compose.render(deployment, image))
    arguments = ["--builtin-schema", "vendor.compose-spec", str(file)]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output

    # Or the above would hold for any file.
    file.write_text(file.read_text().replace("stop_grace_period", "stop_grace_perod"))
    assert CliRunner().invoke(command, arguments).exit_code == 1


def test_kubernetes_schemas_accept_it(deployment: Deployment) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    version = kubernetes_validate.latest_version()
    for one in kubernetes(deployment).values():
        kubernetes_validate.validate(one, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**one, "specs": {}}, version, strict=True)


# --- the same set ------------------------------------------------------------------------------------


def test_compose_runs_the_same_commands(deployment: Deployment) -> None:
    services = interpolated(compose(deployment)["services"])
    expected = processes(deployment, alone, python=PYTHON, gpus=())
    assert list(services) == [process.name for process in expected]
    for process in expected:
        service = services[process.name]
        assert service["command"] == list(process.argv)
        environment = {k: v for k, v in service.get("environment", {}).items() if k != "HF_TOKEN"}
        assert environment == {**process.environment, **caches(process)}
        assert list(service.get("depends_on", {})) == list(process.after)
    # Whom a command names is there, and listens where it is looked for.
    for service in services.values():
        for host, port in re.findall(r"http://([\w-]+):(\d+)", " ".join(service["command"])):
            theirs = services[host]["command"]
            inner = "--inner" in theirs and theirs[theirs.index("--inner") + 1]
            assert f"0.0.0.0:{port}" in (inner, f"0.0.0.0:{theirs[theirs.index('--port') + 1]}")
            assert theirs[theirs.index("--host") + 1] == "0.0.0.0"


def caches(process: Process) -> dict[str, str]:
    """What containers add to an engine's environment."""
    return {"XDG_CACHE_HOME": "/cache"} if is_engine(process) else {}


def test_kubernetes_runs_the_same_commands(deployment: Deployment) -> None:
    objects = kubernetes(deployment)
    expected = processes(deployment, alone, python=PYTHON, gpus=())
    ports = ("--port", "--prometheus-port", "--host", "--prometheus-host")

    def comparable(command: list[str]) -> list[str]:
        shown = [re.sub(r"https?://[^/]+", "URL", one) for one in command]
        return [one for n, one in enumerate(shown) if not n or shown[n - 1] not in ports]

    for process in expected:
        engine = process.role in ("colocated", "prefill", "decode")
        name = f"mixquant-{process.role if engine else 'front'}"
        (container,) = (
            one
            for one in pods(objects)[name]["containers"]
            if one["name"] == ("engine" if engine else process.name)
        )
        command = [one.replace("$$(", "$(") for one in container["command"]]
        assert not any(re.search(r"(?<!\$)\$\(", one) for one in container["command"])
        assert comparable(command) == comparable(list(process.argv))
        values = {one["name"]: one.get("value") for one in container["env"]}
        expected_names = {*process.environment, *process.secrets, *caches(process)}
        assert expected_names == set(values) - {"HF_TOKEN"}
    replicas = {
        name: one["spec"]["replicas"]
        for (kind, name), one in objects.items()
        if kind == "StatefulSet"
    }
    assert replicas == (
        {"mixquant-prefill": 2, "mixquant-decode": 1}
        if deployment.disaggregated
        else {"mixquant-colocated": 1}
    )


def test_pods_find_one_another(deployment: Deployment) -> None:
    objects = kubernetes(deployment)
    listening = {}  # address: port, as seen from the front's pod
    for name, pod in pods(objects).items():
        for container in pod["containers"]:
            command = container["command"]
            port = command[command.index("--port") + 1]
            if "--inner" in command:  # its own metrics, and what the routers ask of it
                inner = command[command.index("--inner") + 1]
                listening[inner.replace("0.0.0.0", "127.0.0.1")] = command
            if ("Service", name) in objects:
                assert objects["StatefulSet", name]["spec"]["serviceName"] == name
                assert objects["Service", name]["spec"]["clusterIP"] == "None"
                for number in range(objects["StatefulSet", name]["spec"]["replicas"]):
                    listening[f"{name}-{number}.{name}:{port}"] = command
            else:
                assert f"127.0.0.1:{port}" not in listening, "two of one pod on one port"
                listening[f"127.0.0.1:{port}"] = command
    commands = [one["command"] for pod in pods(objects).values() for one in pod["containers"]]
    assert set(re.findall(r"http://([^/\"]+)", json.dumps(commands))) <= set(listening)
    for (kind, _), one in objects.items():
        if kind == "Service":
            assert_selects(objects, one["spec"]["selector"], one["spec"]["ports"])


def assert_selects(objects: Any, selector: dict[str, str], ports: list[dict[str, Any]]) -> None:
    """A selector finds pods that have the ports, by their names."""
    found = []
    for one in objects.values():
        template = one["spec"].get("template")
        if template and selector.items() <= template["metadata"]["labels"].items():
            assert one["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            found.append(template["spec"])
    (pod,) = found
    known = {port["name"] for container in pod["containers"] for port in container.get("ports", [])}
    assert {port["targetPort"] for port in ports} <= known


# --- secrets -----------------------------------------------------------------------------------------


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEY", KEY)
    file = tmp_path / "key"
    file.write_text(KEY)
    for source in ({"api_key_variable": "KEY"}, {"api_key_file": str(file)}):
        deployment = Deployment.from_values({**SET, **source})
        for text in (
            render_compose.render(deployment),
            render_kubernetes.render(deployment, IMAGE),
        ):
            assert KEY not in text


def test_compose_hands_secrets_over_as_files(deployment: Deployment) -> None:
    document = compose(deployment)
    used = {name for one in document["services"].values() for name in one.get("secrets", [])}
    assert used == set(document.get("secrets", {}))
    assert used == wanted_secrets(deployment)
    if deployment.api_key_file is not None:
        assert os.path.isabs(document["secrets"]["api-key"]["file"])
    for process in processes(deployment, alone):
        service = document["services"][process.name]
        assert set(service.get("secrets", [])) == set(process.secrets.values())
        assert not set(process.secrets) & set(service.get("environment", {}))


@settings(deadline=None, max_examples=up_to(20))
@given(
    key=st.text("abcXYZ019-_.~$`'\"\\", min_size=1),
    arguments=st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"))),
)
def test_the_entrypoint_puts_secrets_into_the_environment_alone(
    key: str, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    service = interpolated(compose(Deployment.from_values(SET))["services"]["prefill-0"])
    file = tmp_path_factory.mktemp("secrets") / "engine-key"
    shell, option, script = service["entrypoint"]
    script = script.replace("/run/secrets/engine-key", str(file))
    show = "import json, os, sys; print(json.dumps([os.environ['VLLM_API_KEY'], sys.argv[1:]]))"
    command = [shell, option, script, sys.executable, "-S", "-c", show, *arguments]
    missing = subprocess.run(command, capture_output=True, text=True)
    file.write_text("\n")
    empty = subprocess.run(command, capture_output=True, text=True)
    assert missing.returncode and empty.returncode
    assert str(file) in missing.stderr and f"{file} is empty" in empty.stderr
    file.write_text(key + "\n")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [key, arguments]


def test_kubernetes_reads_secrets_from_one_secret(deployment: Deployment) -> None:
    text = render_kubernetes.render(deployment, IMAGE)
    wanted = wanted_secrets(deployment)
    assert set(re.findall(r'--from-literal="([\w-]+)=', text)) == wanted
    found = set()
    for pod in pods(kubernetes(deployment)).values():
        for container in pod["containers"]:
            for one in container["env"]:
                if source := one.get("valueFrom", {}).get("secretKeyRef"):
                    assert source["name"] == "mixquant-keys"
                    assert source.get("optional", False) == (one["name"] == "HF_TOKEN")
                    found.add(source["key"])
    assert found - {"hf-token"} == wanted


# --- who can reach what ------------------------------------------------------------------------------


def test_compose_publishes_the_front_alone(deployment: Deployment) -> None:
    published = {
        name: one["ports"]
        for name, one in compose(deployment)["services"].items()
        if "ports" in one
    }
    public = "front" if deployment.disaggregated else "engine"
    target = {"target": 8000, "published": str(deployment.port), "protocol": "tcp"}
    assert published == {public: [{**target, "host_ip": deployment.host}]}


def test_routers_listen_where_only_the_fronts_pod_is() -> None:
    objects = kubernetes(Deployment.from_values(SET))
    front = pods(objects)["mixquant-front"]
    assert len(front["containers"]) == 3
    for container in front["containers"]:
        command = container["command"]
        host = command[command.index("--host") + 1]
        assert host == ("0.0.0.0" if container["name"] == "front" else "127.0.0.1")
        probe = container["readinessProbe"]
        assert ("exec" in probe) == (host == "127.0.0.1")
    (policy,) = (one["spec"] for (kind, _), one in objects.items() if kind == "NetworkPolicy")
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mixquant"}}}
    assert policy["ingress"] == [{"from": [ours]}]


# --- GPUs, memory, models ----------------------------------------------------------------------------


def test_each_engine_has_its_gpus() -> None:
    deployment = Deployment.from_values(DEPLOYMENTS["a set with everything"])
    devices = {
        name: one["deploy"]["resources"]["reservations"]["devices"]
        for name, one in compose(deployment)["services"].items()
        if "deploy" in one
    }
    gpus = {"prefill-0": ["4", "5"], "prefill-1": ["6", "7"], "decode-0": ["0", "1"]}
    assert devices == {
        name: [{"driver": "nvidia", "capabilities": ["gpu"], "device_ids": its}]
        for name, its in gpus.items()
    }
    for name, pod in pods(kubernetes(deployment)).items():
        for container in pod["containers"]:
            limits = container.get("resources", {}).get("limits", {})
            assert limits == ({} if name == "mixquant-front" else {"nvidia.com/gpu": 2})


@pytest.mark.parametrize("name", ["a set", "a set with everything"])
def test_engines_see_checkpoints_and_caches(name: str) -> None:
    deployment = Deployment.from_values(DEPLOYMENTS[name])
    paths = ["/models/Qwen3-8B", "/models/Qwen3-8B-NVFP4"] if "everything" in name else []
    document = compose(deployment)
    assert list(document["volumes"]) == ["cache"]
    for service in document["services"].values():
        if "deploy" not in service:
            assert "volumes" not in service
            continue
        targets = {one["target"]: one["source"] for one in service["volumes"]}
        cache = service["environment"]["XDG_CACHE_HOME"]
        assert targets == {cache: "cache", **{path: path for path in paths}}
        assert ("HF_TOKEN" in service["environment"]) == (not paths)
        assert service["ipc"] == "host"  # with the machine's shared memory
    objects = kubernetes(deployment)
    for name, pod in pods(objects).items():
        if name == "mixquant-front":
            continue
        (container,) = pod["containers"]
        mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        (cache,) = (one["value"] for one in container["env"] if one["name"] == "XDG_CACHE_HOME")
        assert set(mounted) == {cache, "/dev/shm", *paths}
        assert mounted[cache] == "cache"
        claims = objects["StatefulSet", name]["spec"]["volumeClaimTemplates"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        claimed = {one["metadata"]["name"] for one in claims}
        assert set(mounted.values()) == set(volumes) | claimed
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        for path in paths:
            assert volumes[mounted[path]]["hostPath"]["path"] == path


def test_an_engine_may_take_its_time_to_start(deployment: Deployment) -> None:
    for pod in pods(kubernetes(deployment)).values():
        for container in pod["containers"]:
            if container["name"] == "engine":
                probe = container["startupProbe"]
                patience = probe["failureThreshold"] * probe["periodSeconds"]
                assert deployment.start_timeout <= patience < deployment.start_timeout + 10
                assert {"readinessProbe", "livenessProbe"} <= set(container)


# --- bad input, and the documentation ----------------------------------------------------------------


def test_what_does_not_hold_in_containers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    deployment = Deployment.from_values({**SET, "model": "model"})
    for render in (render_compose.render, render_kubernetes.render):
        with pytest.raises(ServeError, match=r"model is a directory: .* absolute path"):
            render(deployment, IMAGE)
    with pytest.raises(ServeError, match="--image NAME"):
        render_kubernetes.render(Deployment.from_values(SET))
    with pytest.raises(ServeError, match=r"IP address.*'gpu\.example'"):
        render_compose.render(Deployment.from_values({**SET, "host": "gpu.example"}))


def test_the_image_that_compose_builds_is_the_documented_one() -> None:
    document = compose(Deployment.from_values(SET), image=None)
    built = [one for one in document["services"].values() if "build" in one]
    (build,) = (interpolated(one["build"]) for one in built)
    assert build["dockerfile_inline"] == DOCKERFILE
    # No package index has mixquant: a name would install nothing, or somebody else's package.
    assert f"COPY {WHEEL} " in DOCKERFILE
    assert {one["image"] for one in document["services"].values()} == {built[0]["image"]}
    assert DOCKERFILE in (DOCS / "guide" / "containers.md").read_text()


def test_the_command_prints_the_manifest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(yaml.safe_dump(SET))
    described = Deployment.from_values(SET)
    assert cli.main(["serve", "--config", str(file), "--render", "compose"]) == 0
    assert capsys.readouterr().out == render_compose.render(described)
    asking = ["serve", SET["model"], "--prefill", "2", "--decode", "1"]
    assert cli.main([*asking, "--render", "kubernetes", "--image", IMAGE]) == 0
    assert capsys.readouterr().out == render_kubernetes.render(described, IMAGE)
    for wrong in (["--render", "kubernetes"], ["--render", "nomad"], ["--image", IMAGE]):
        assert cli.main([*asking, *wrong]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ")


def test_compose_publishes_the_metrics_of_the_front_on_the_loopback_address() -> None:
    set_of: dict[str, Any] = {"model": "m", "prefill": 1, "decode": 1, "host": "0.0.0.0"}
    (public,) = compose(Deployment(**set_of))["services"]["front"]["ports"]
    described = Deployment(**set_of, metrics_port=9090)
    first, metrics = compose(described)["services"]["front"]["ports"]
    assert first == public
    assert metrics == {
        "target": METRICS, "published": "9090", "host_ip": "127.0.0.1", "protocol": "tcp"
    }  # fmt: skip
    front = compose(described)["services"]["front"]["command"]
    assert front[front.index("--inner") + 1] == f"0.0.0.0:{METRICS}"


def test_the_metrics_port_is_one_of_the_fronts_pod() -> None:
    described = Deployment(model="m", prefill=1, decode=1, metrics_port=9090)
    pod = pods(kubernetes(described))["mixquant-front"]
    by_name = {one["name"]: one for one in pod["containers"]}
    front = by_name["front"]
    assert {"name": "metrics", "containerPort": 9090} in front["ports"]
    assert front["command"][front["command"].index("--inner") + 1] == "0.0.0.0:9090"
    for name in ("router-transfer", "router-direct"):
        command = by_name[name]["command"]
        assert command[command.index("--key-check") + 1] == (
            "http://127.0.0.1:9090/internal/key-check"
        )


@pytest.mark.parametrize("port", [8001, 8002, 29001, 29002])
def test_a_metrics_port_that_the_fronts_pod_has_already(port: int) -> None:
    described = Deployment(model="m", prefill=1, decode=1, metrics_port=port)
    with pytest.raises(ServeError, match=f"^metrics_port: {port} is a port of the front's pod"):
        kubernetes(described)
