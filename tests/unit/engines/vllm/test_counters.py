"""The vLLM engine's counters, which several processes share, and its check of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from mixquant.engines.vllm import counters
from mixquant.engines.vllm.counters import Counters
from mixquant.engines.vllm.loading import memory
from mixquant.engines.vllm.loading.memory import CopyDoesNotFit, Ledger

# --- counters ----------------------------------------------------------------------------------------

TWO_PROCESSES = """
import os, sys
from mixquant.engines.vllm.counters import Counters
path = Counters.create(2)
mine = Counters(path, 0)
mine.add((5, 2, 0, 1), "quantized")
child = os.fork()
if child == 0:
    theirs = Counters(path, 1)
    for _ in range(1000):
        theirs.add((1, 0, 7, 3), "precise")
    sys.exit()  # runs what is registered for the exit
for _ in range(1000):
    mine.add((2, 0, 0, 0), "graph")
os.waitpid(child, 0)
everything = Counters(path)
print(path, os.path.exists(path), *everything.rows().values(), *everything.passes().values())
"""


def test_two_processes_share_the_file_and_its_owner_removes_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES], capture_output=True, text=True, check=True
    )
    path, there, *numbers = done.stdout.split()
    assert there == "True"  # after the child's end
    assert [int(number) for number in numbers] == [3005, 2, 7000, 3001, 1, 1000, 1000, 0]
    assert not Path(path).exists()


def test_counters_on_the_metrics_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(counters, "_collector", None)
    first, second = Counters.create(2), Counters.create(1)
    Counters(first, 0).add((100, 4, 0, 3), "quantized")
    Counters(first, 1).add((10, 0, 0, 0), "quantized")
    Counters(second, 0).add((0, 0, 9, 7), "graph")
    page = generate_latest(registry).decode()
    for line in (
        'mixquant_rows_total{engine="0",phase="prefill",precision="quantized"} 110.0',
        'mixquant_rows_total{engine="0",phase="prefill",precision="precise"} 4.0',
        'mixquant_rows_total{engine="0",phase="decode",precision="precise"} 3.0',
        'mixquant_rows_total{engine="1",phase="decode",precision="precise"} 7.0',
        'mixquant_rows_total{engine="1",phase="decode",precision="quantized"} 9.0',
        'mixquant_passes_total{engine="0",kind="quantized"} 2.0',
        'mixquant_passes_total{engine="1",kind="graph"} 1.0',
        "# TYPE mixquant_rows_total counter",
    ):
        assert line in page.splitlines()
    assert first is not None and second is not None
    Path(second).unlink()
    page = generate_latest(registry).decode()
    assert 'engine="0"' in page and 'engine="1"' not in page
    Path(first).unlink()


def test_several_api_processes_share_prometheus_own_files(tmp_path: Path) -> None:
    """As vLLM has it: the mode is chosen after prometheus_client was imported, and then forked."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    script = """
import os, prometheus_client
os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ["DIRECTORY"]
from mixquant.engines.vllm.counters import Counters
assert Counters.create(2) is None
if os.fork() == 0:
    Counters(None).add((5, 2, 0, 1), "quantized")
    os._exit(0)
os.wait()
counters = Counters(None)
counters.add((10, 0, 0, 4), "graph")
assert list(counters.rows().values()) == [10, 0, 0, 4]
"""
    environment = {**os.environ, "DIRECTORY": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    page = generate_latest(registry).decode().splitlines()
    for line in (
        'mixquant_rows_total{engine="0",phase="prefill",precision="quantized"} 15.0',
        'mixquant_rows_total{engine="0",phase="decode",precision="precise"} 5.0',
        'mixquant_passes_total{engine="0",kind="graph"} 1.0',
    ):
        assert line in page


def test_a_reader_sees_what_is_counted_meanwhile_and_cannot_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counters, "_export", lambda path: None)
    path = Counters.create(1)
    reader, writer = Counters(path), Counters(path, 0)
    writer.add((1, 2, 0, 3), "precise")
    writer.add((1, 2, 0, 3), "quantized")
    assert list(reader.rows().values()) == [2, 4, 0, 6]
    assert reader.passes() == {"quantized": 1, "precise": 1, "graph": 0, "quantized_graph": 0}
    with pytest.raises(ValueError):
        reader.add((1, 1, 0, 1), "graph")


# --- memory ------------------------------------------------------------------------------------------

GIB = 2**30
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    monkeypatch.setattr(memory, "_layer_count", lambda: 4)

    def is_free(gib: float) -> None:
        monkeypatch.setattr(memory, "_free", lambda device, before: gib * GIB)

    return is_free


def lay_out(ledger: Ledger, device: torch.device, layers: int = 4) -> None:
    """Per layer 2 GiB of weights and 1 GiB of copy, in two projections."""
    for layer in range(layers):
        for name in ("qkv_proj", "down_proj"):
            prefix = f"model.layers.{layer}.{name}"
            ledger.reserve(device, prefix, GIB // 2, GIB, "do this or that")


def test_copies_that_fit(free: Callable[[float], None]) -> None:
    free(4.0)
    lay_out(Ledger(), GPU)
    free(12.0)  # where empty weights take no memory yet
    lay_out(Ledger(), CPU)


@pytest.mark.parametrize(
    ("device", "gib", "at", "missing"),
    [
        # 4 GiB of copies are 0.1 too many, which shows at the last projection only.
        (GPU, 3.9, 8, "0.1 GiB"),
        # At the fourth: half of the layers have 2 GiB; as much again, and the weights to come, 4.
        (GPU, 1.9, 4, "6.1 GiB"),
        # At the first: a quarter of the layers, so far: half a GiB and a GiB each.
        (GPU, 0.25, 1, "4.8 GiB"),
        (CPU, 11.5, 8, "0.5 GiB"),
        (CPU, 1.0, 1, "5.0 GiB"),
    ],
)
def test_too_little_memory_is_found_out_early(
    device: torch.device, gib: float, at: int, missing: str, free: Callable[[float], None]
) -> None:
    free(gib)
    ledger = Ledger()
    with pytest.raises(CopyDoesNotFit) as caught:
        lay_out(ledger, device)
    assert len(ledger._copies) == at
    message = str(caught.value)
    assert "\n" not in message
    assert f"{missing} are missing on {device}" in message
    assert message.endswith("do this or that")


def test_a_layer_counts_once_however_often_it_is_made(free: Callable[[float], None]) -> None:
    free(1.0)
    ledger = Ledger()
    for _ in range(5):
        lay_out(ledger, GPU, layers=1)
    with pytest.raises(CopyDoesNotFit):
        lay_out(ledger, GPU, layers=2)


@pytest.mark.parametrize("device", [GPU, CPU])
def test_weights_that_do_not_stay_need_no_room(
    device: torch.device, free: Callable[[float], None]
) -> None:
    """In a prefill engine."""
    ledger = Ledger()
    free(0.6)
    ledger.reserve(device, "model.layers.0.qkv_proj", GIB // 2, 0, "")
    with pytest.raises(CopyDoesNotFit) as caught:  # of four layers: two of 2 GiB
        ledger.reserve(device, "model.layers.0.down_proj", GIB // 2, 0, "do this")
    assert str(caught.value) == (
        f"the quantized copy of the weights does not fit: about 3.4 GiB are missing on {device}; "
        "do this"
    )


def test_layers_without_a_number(free: Callable[[float], None]) -> None:
    free(1.0)
    with pytest.raises(CopyDoesNotFit, match=r"1\.0 GiB"):
        Ledger().reserve(GPU, "lm_head", 2 * GIB, GIB, "")


def test_free_memory_of_a_cpu_is_what_can_be_had() -> None:
    import psutil

    assert 0 < memory._free(CPU, 0) <= psutil.virtual_memory().total
