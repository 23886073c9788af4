"""The description of a deployment, its processes, and what a machine has to have for it."""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.cli import main
from mixquant.serve import checks
from mixquant.serve.addresses import local_addresses
from mixquant.serve.commands import Process, dry_run, processes
from mixquant.serve.description import Deployment, ServeError, api_key, read
from mixquant.servers.ports import free_ports

SET = {"model": "m", "prefill": 2, "decode": 1}


def described(**values: Any) -> Deployment:
    return Deployment.from_values({"model": "m", **values})


def of(deployment: Deployment, **options: Any) -> dict[str, Process]:
    return {one.name: one for one in processes(deployment, local_addresses(deployment), **options)}


def option(process: Process, name: str) -> str:
    (value,) = [b for a, b in zip(process.argv, process.argv[1:], strict=False) if a == name]
    return value


# --- what is refused ---------------------------------------------------------------------------------


def test_arguments_and_variables_that_nobody_decides_are_passed_on() -> None:
    arguments = "--quantization-config {} --model-impl auto --config-format hf -pp 2 -O3 -dp 1 -n 1"
    variables = {"CUDA_VISIBLE_DEVICES": 1, "_A1": 2.5, "lower": ""}
    found = Deployment.from_values(
        {"model": "m", "vllm_arguments": arguments, "environment": variables}
    )
    assert list(found.vllm_arguments) == arguments.split()
    assert found.environment == {"CUDA_VISIBLE_DEVICES": "1", "_A1": "2.5", "lower": ""}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("model: a\nport: 1\nmodel: b\n", 3, "model"),
        ("model: a\nrecipe: {format: int8, 'format': fp8}\n", 2, "format"),
        ("model: a\nenvironment:\n  A: 1\n  B: 2\n  A: 3\n", 5, "A"),
        ("model: a\nvllm_arguments: [{x: 1, x: 2}]\n", 2, "x"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, line: int, key: str, tmp_path: Path) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(text)
    with pytest.raises(ServeError) as caught:
        read(file)
    assert str(caught.value) == f"{file} is not YAML: line {line}: {key!r} appears twice"


def test_an_alias_and_a_merge_are_no_second_key(tmp_path: Path) -> None:
    file = tmp_path / "set.yaml"
    file.write_text("model: a\nenvironment: &e {A: 1}\nrecipe: {<<: *e, A: 2}\nlog_folder: *e\n")
    assert read(file) == {
        "model": "a",
        "environment": {"A": 1},
        "recipe": {"A": 2},
        "log_folder": {"A": 1},
    }
    file.write_text("")
    with pytest.raises(ServeError, match="expected a mapping"):
        read(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"prefil": 1}, "unknown key 'prefil'; the keys are model, "),
        ({"prefill": 0, "decode": 1}, "prefill: Input should be greater than or equal to 1, got 0"),
        ({"prefill": "two", "decode": 1}, "prefill: Input should be a valid integer, got 'two'"),
        ({"prefill": True, "decode": 1}, "prefill: Input should be a valid integer, got True"),
        ({"prefill": 1}, "prefill needs decode"),
        ({"decode": 1}, "decode needs prefill"),
        ({"prefill_gpus": [0]}, "prefill_gpus needs prefill and decode"),
        (
            {"prefill": 1, "decode": 1, "prefill_gpus": "0", "decode_gpus": "0"},
            "GPU 0 is in prefill_gpus and in decode_gpus",
        ),
        (
            {"prefill": 2, "decode": 1, "prefill_gpus": "1,1"},
            "prefill_gpus names a GPU twice: 1, 1",
        ),
        (
            {"prefill": 1, "decode": 1, "decode_gpus": "1,2", "tensor_parallel_size": 4},
            "decode_gpus: 1 engines of 4 GPUs each need 4, not 2 (1, 2)",
        ),
        ({"prefill": 1, "decode": 1, "decode_gpus": "a"}, "decode_gpus: Input should be a valid"),
        ({"prefill": 1, "decode": 1, "decode_gpus": "-1"}, "decode_gpus: Input should be greater"),
        ({"vllm_arguments": "--port 3"}, "vllm_arguments: --port is set by mixquant serve"),
        ({"vllm_arguments": "--api-key=x"}, "vllm_arguments: --api-key is set by"),
        ({"vllm_arguments": "--served_model_name x"}, "--served_model_name is set by"),
        ({"vllm_arguments": "--quantiz fp8"}, "--quantiz (--quantization) is set by"),
        ({"vllm_arguments": "-qfp8"}, "-qfp8 (-q) is set by mixquant serve"),
        ({"vllm_arguments": "-t 2"}, "-t (-tp) is set by mixquant serve"),
        (
            {**SET, "decode_arguments": "--served x"},
            "decode_arguments: --served (--served-model-name)",
        ),
        (
            {"vllm_arguments": "--additional-config.mixquant.preset exact"},
            "(--additional-config) is",
        ),
        ({"vllm_arguments": "--config options.yaml"}, "--config may hide options that are decided"),
        ({"environment": {"": "x"}}, "environment: '' is not a variable's name"),
        ({"environment": {"A=B": "x"}}, "environment: 'A=B' is not a variable's name"),
        ({"environment": {"1A": "x"}}, "environment: '1A' is not a variable's name"),
        ({"environment": {"A B": "x"}}, "environment: 'A B' is not a variable's name"),
        ({"environment": {"A\n": "x"}}, "environment: 'A\\n' is not a variable's name"),
        ({"environment": {"A": "x\0"}}, "environment: the value of A holds a NUL"),
        ({"environment": {"A": True}}, "environment: Input should be a valid string"),
        ({"environment": {"A": False}}, "environment: Input should be a valid string"),
        ({"environment": {"VLLM_API_KEY": "x"}}, "VLLM_API_KEY is decided by api_key_variable"),
        (
            {**SET, "environment": {"CUDA_VISIBLE_DEVICES": 0}},
            "CUDA_VISIBLE_DEVICES is decided by prefill_gpus and decode_gpus",
        ),
        ({"recipe": "nope"}, "unknown recipe 'nope'"),
        ({**SET, "recipe": {"role": "prefill"}}, "recipe: leave out role"),
        ({"port": 70000}, "port: Input should be less than or equal to 65535, got 70000"),
        ({"environment": {"A": None}}, "environment: Input should be a valid string"),
        ({"api_key_variable": "A B"}, "api_key_variable: String should match"),
        ({"api_key_variable": "A", "api_key_file": "f"}, "give api_key_variable or api_key_file"),
        ({"routing": "best"}, "routing: Input should be 'consistent_hash'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    values = {k: v for k, v in {"model": "m", **values}.items() if v is not None}
    with pytest.raises(ServeError) as error:
        Deployment.from_values(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping such as 'model: NAME'"),
        ("1: a", "expected a mapping"),
        ("", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_description(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(text)
    with pytest.raises(ServeError, match=re.escape(message)):
        read(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ServeError, match="not UTF-8"):
        read(tmp_path / "binary.yaml")


def test_the_command_line_refuses_before_it_looks_at_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "set.yaml"
    file.write_text("model: nowhere\nprefill: 1\ndecode: 1\ncolour: red\n")
    assert main(["serve", "--config", str(file)]) == 2
    assert f"error: {file}: unknown key 'colour'" in capsys.readouterr().err
    file.write_text("modell: nowhere\n")
    assert main(["serve", "--config", str(file)]) == 2
    assert f"error: {file}: unknown key 'modell'" in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert "no model is named" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--prefill", "0", "--decode", "1"]) == 2
    assert "prefill" in capsys.readouterr().err


# --- YAML and the command line say the same ----------------------------------------------------------


def test_a_file_says_what_options_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, smollm2_path: str
) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(
        f"model: {smollm2_path}\nserved_model_name: m\nprefill: 2\ndecode: 1\nport: 8765\n"
        "recipe: {preset: fast}\nmin_transfer_tokens: 99\ndecode_fallback: false\n"
        "api_key_variable: KEY\nvllm_arguments: --max-model-len 2048\n"
        "decode_arguments: [--max-num-seqs, 4]\n"
    )
    options = [smollm2_path, "--served-model-name", "m", "--prefill", "2", "--decode", "1"]
    options += ["--port", "8765", "--recipe", "fast", "--min-transfer-tokens", "99"]
    options += ["--no-decode-fallback", "--api-key-variable", "KEY"]
    options += ["--decode-args", "--max-num-seqs 4", "--dry-run", "--", "--max-model-len", "2048"]
    assert main(["serve", "--config", str(file), "--dry-run"]) == 0
    by_file = capsys.readouterr().out
    assert main(["serve", *options]) == 0
    by_options = capsys.readouterr().out
    ports = re.compile(r"(?<=[: =])\d{5}\b")  # free ones, other every time
    assert ports.sub("P", by_file) == ports.sub("P", by_options)
    assert "--max-num-seqs 4" in by_file
    assert "8765" in by_file


def test_an_option_goes_before_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, smollm2_path: str
) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(f"model: {smollm2_path}\nport: 8765\n")
    assert main(["serve", "--config", str(file), "--port", "8766", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--port 8766" in shown
    assert "8765" not in shown


@given(
    prefill=st.integers(1, 4),
    decode=st.integers(1, 4),
    size=st.integers(1, 3),
    names=st.sampled_from([None, "prefill", "decode"]),
    seed=st.randoms(),
)
def test_values_come_back_and_no_gpu_is_given_twice(
    prefill: int, decode: int, size: int, names: str | None, seed: Any
) -> None:
    values: dict[str, Any] = {
        "model": "m",
        "prefill": prefill,
        "decode": decode,
        "tensor_parallel_size": size,
    }
    if names is not None:
        values[f"{names}_gpus"] = seed.sample(range(30), (values[names]) * size)
    deployment = Deployment.from_values(values)
    assert Deployment.from_values(deployment.model_dump(mode="json")) == deployment
    engines = [one for one in of(deployment).values() if one.role in ("prefill", "decode")]
    given_ = list(chain.from_iterable(one.gpus for one in engines))
    assert len(given_) == len(set(given_)) == (prefill + decode) * size
    if names is not None:
        of_role = chain.from_iterable(one.gpus for one in engines if one.role == names)
        assert list(of_role) == values[f"{names}_gpus"]


# --- processes ---------------------------------------------------------------------------------------


def test_the_processes_of_a_set() -> None:
    deployment = described(**SET, api_key_variable="KEY", vllm_arguments="--max-model-len 9")
    found = of(deployment)
    assert list(found) == [
        *("prefill-0", "prefill-1", "decode-0"),
        *("router-transfer", "router-direct", "front"),
    ]
    for name, process in found.items():
        if process.role in ("prefill", "decode"):
            assert option(process, "--model") == option(process, "--served-model-name") == "m"
            assert option(process, "--max-model-len") == "9"
            assert option(process, "--host") == "127.0.0.1"
            recipe = json.loads(option(process, "--additional-config"))["mixquant"]
            assert recipe["role"] == process.role
            assert recipe["precise_tail"] == (0 if process.role == "prefill" else 1)
            transfer = json.loads(option(process, "--kv-transfer-config"))
            assert transfer["kv_connector"] == "NixlConnector"
            assert transfer["kv_load_failure_policy"] == "recompute"
            assert (
                process.environment["CUDA_VISIBLE_DEVICES"]
                == {
                    "prefill-0": "0",
                    "prefill-1": "1",
                    "decode-0": "2",
                }[name]
            )
    router = found["router-transfer"].argv
    assert [b for a, b in pairwise(router) if a == "--prefill"] == [
        found["prefill-0"].address.url,
        found["prefill-1"].address.url,
    ]
    assert option(found["router-direct"], "--worker-urls") == found["decode-0"].address.url
    assert option(found["front"], "--port") == "8000"
    assert found["front"].secrets["MIXQUANT_API_KEY"] == "api-key"
    ports = list(chain.from_iterable(one.ports.values() for one in found.values()))
    assert len(ports) == len(set(ports))


def test_without_fallback_an_engine_fails_what_it_cannot_fetch() -> None:
    found = of(described(**SET, decode_fallback=False))
    transfer = json.loads(option(found["decode-0"], "--kv-transfer-config"))
    assert transfer["kv_load_failure_policy"] == "fail"
    assert "--no-decode-fallback" in found["front"].argv


def test_gpus_keep_the_names_by_which_this_process_sees_them() -> None:
    found = of(described(**SET), gpus=["5", "GPU-abc", "7"])
    named = [found[n].environment["CUDA_VISIBLE_DEVICES"] for n in ("prefill-1", "decode-0")]
    assert named == ["GPU-abc", "7"]
    assert "CUDA_VISIBLE_DEVICES" not in of(described(**SET), gpus=[])["decode-0"].environment


def test_one_colocated_engine_needs_no_router() -> None:
    (engine,) = of(described(port=9, api_key_file="key")).values()
    assert engine.role == "colocated"
    assert engine.secrets == {"VLLM_API_KEY": "api-key"}
    assert "--kv-transfer-config" not in engine.argv
    assert engine.health_url == "http://127.0.0.1:9/health"


def test_the_dry_run_can_be_read_back_as_shell_text() -> None:
    deployment = described(**SET, environment={"A": "b c"}, api_key_variable="KEY")
    started = processes(deployment, local_addresses(deployment))
    text = dry_run(started)
    commands = [block for block in text.split("\n\n") if block.strip()]
    assert len(commands) == len(started)
    for block, process in zip(commands, started, strict=True):
        _, _, command = block.partition("\n")
        words = shlex.split(command.replace("\\\n", " "))
        assert tuple(words[-len(process.argv) :]) == process.argv
        assigned = dict(word.split("=", 1) for word in words[: -len(process.argv)])
        assert assigned == {
            **process.environment,
            **{name: f"<{secret}>" for name, secret in process.secrets.items()},
        }


def test_what_listens_everywhere_is_probed_on_this_machine() -> None:
    assert of(described(host="0.0.0.0"))["engine"].health_url == "http://127.0.0.1:8000/health"
    assert of(described(host="::"))["engine"].health_url == "http://[::1]:8000/health"


# --- the key -----------------------------------------------------------------------------------------


def test_the_key_comes_from_a_variable_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KEY", "from-variable")
    (tmp_path / "key").write_text("from-file\n")
    assert api_key(described()) is None
    assert api_key(described(api_key_variable="KEY")) == "from-variable"
    assert api_key(described(api_key_file=tmp_path / "key")) == "from-file"


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("ODD", "a b")
    for values, message in (
        ({"api_key_variable": "KEY"}, "environment variable KEY.* is not set"),
        ({"api_key_file": tmp_path / "empty"}, "is empty"),
        ({"api_key_file": tmp_path / "none"}, "cannot read the API key"),
        ({"api_key_variable": "ODD"}, "printable ASCII without spaces"),
    ):
        with pytest.raises(ServeError, match=message):
            api_key(described(**values))


# --- the machine -------------------------------------------------------------------------------------

GPUS = [checks.Gpu("0", 80 * 2**30), checks.Gpu("1", 80 * 2**30)]


def test_gpus_that_are_not_there() -> None:
    checks.check_gpus(described(prefill=1, decode=1), GPUS)
    checks.check_gpus(described(prefill=1, decode=1), [])  # a CPU
    for values, gpus, message in (
        ({**SET}, GPUS, "3 engines of 1 GPUs each need 3 GPUs, and this machine shows 2"),
        ({"prefill": 1, "decode": 1, "decode_gpus": [7]}, GPUS, "there is no GPU 7"),
        ({"prefill": 1, "decode": 1, "decode_gpus": [0]}, [], "this machine shows none"),
        ({"tensor_parallel_size": 4}, GPUS, "need 4 GPUs"),
    ):
        with pytest.raises(ServeError, match=message):
            checks.check_gpus(described(**values), gpus)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    checks.check_memory(described(prefill=1, decode=1), 79 * gib, GPUS)
    checks.check_memory(described(tensor_parallel_size=2), 110 * gib, GPUS)
    with pytest.raises(ServeError, match=r"decode engine needs at least 81.0 GiB"):
        checks.check_memory(described(prefill=1, decode=1), 81 * gib, GPUS)
    with pytest.raises(ServeError, match="raise tensor_parallel_size"):
        checks.check_memory(described(), 79 * gib, GPUS)
    monkeypatch.setattr(checks, "_available_memory", lambda: 10 * gib)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    checks.check_memory(described(**SET), 6 * gib, [])
    caches = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with pytest.raises(ServeError, match=r"3 engines need at least 12.4 GiB .*3.0 of it KV cache"):
        checks.check_memory(described(**SET, environment=caches), 6 * gib, [])


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on port {port} of 127.0.0.1"):
            checks.reserve_port(described(port=port))
    for one in checks.reserve_port(described(port=port)):
        one.close()
    with pytest.raises(ServeError, match="cannot listen on port"):
        checks.reserve_port(described(host="no.such.host.invalid"))


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no files")
@pytest.mark.parametrize("first", [{}, SET])
@pytest.mark.parametrize("second", [{}, SET])
def test_two_do_not_start_on_one_port(first: dict[str, Any], second: dict[str, Any]) -> None:
    (port,) = free_ports(1)
    held = checks.reserve_port(described(port=port, **first))
    try:
        with pytest.raises(ServeError, match=f"cannot listen on port {port} of 127.0.0.1"):
            checks.reserve_port(described(port=port, **second))
        with pytest.raises(ServeError, match=f"cannot listen on port {port} of localhost"):
            checks.reserve_port(described(port=port, host="localhost", **second))
        # What the first one starts can listen: vLLM binds as here.
        if not first:
            with socket.socket() as engine:
                engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                engine.bind(("127.0.0.1", port))
                engine.listen()
                with pytest.raises(ServeError):
                    checks.reserve_port(described(port=port, host="0.0.0.0", **second))
    finally:
        for one in held:
            one.close()
    for one in checks.reserve_port(described(port=port, **second)):
        one.close()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vllm", r"vLLM is not installed: pip install 'mixquant\[vllm\]'"),
        ("vllm_router", r"needs vllm-router, .* pip install 'mixquant\[serve\]'"),
        ("setproctitle", "setproctitle is not installed"),
        ("nixl", "pip install --no-deps nixl"),
        ("nixl_cu", "pip install nixl-cu13"),
    ],
)
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    def found(name: str) -> bool | None:
        gone = name.startswith("nixl_") if missing == "nixl_cu" else name == missing
        return None if gone else True

    monkeypatch.setattr(checks.importlib.util, "find_spec", found)
    with pytest.raises(ServeError, match=message):
        checks.check_packages(described(**SET))
