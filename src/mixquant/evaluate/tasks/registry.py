"""The benchmarks by name. Their modules are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mixquant.evaluate.tasks import Task, TaskError

TASKS: Mapping[str, tuple[str, str]] = {  # name: module below this package, class
    "math500": ("mathematics", "Math500"),
    "aime24": ("mathematics", "Aime24"),
    "aime25": ("mathematics", "Aime25"),
    "gsm8k": ("mathematics", "Gsm8k"),
    "gpqa-diamond": ("gpqa", "GpqaDiamond"),
    "longbench-v2": ("longbench", "LongBenchV2"),
    "longmemeval": ("longmemeval", "LongMemEval"),
    "aa-lcr": ("aa_lcr", "AaLcr"),
    "needle": ("needle", "Needle"),
    "bfcl-v4": ("bfcl", "BfclV4"),
    "tau2-bench": ("tau2", "Tau2Bench"),
}

PROTOCOLS: Mapping[str, Mapping[str, tuple[str, str]]] = {  # benchmarks that others ask differently
    "mix-quant": {
        "math500": ("mix_quant", "Math500"),
        "aime24": ("mix_quant", "Aime24"),
        "aime25": ("mix_quant", "Aime25"),
        "gsm8k": ("mix_quant", "Gsm8k"),
        "gpqa-diamond": ("mix_quant", "GpqaDiamond"),
        "longbench-v2": ("mix_quant", "LongBenchV2"),
        "longmemeval": ("mix_quant", "LongMemEval"),
    },
}


def task(name: str, options: Mapping[str, Any] | None = None, protocol: str | None = None) -> Task:
    """The benchmark of that name.

    Args:
        options: of `mixquant.evaluate.tasks.OPTIONS`, those that were given; a benchmark gets those
            that it takes.
        protocol: one of `PROTOCOLS`; a benchmark that it does not name is ours. None: ours.

    Raises:
        TaskError: there is none; the message lists those there are.
    """
    if name not in TASKS:
        raise TaskError(f"unknown benchmark {name!r}, expected one of: {', '.join(TASKS)}")
    module, cls = PROTOCOLS.get(protocol or "", {}).get(name, TASKS[name])
    kind = getattr(importlib.import_module(f"mixquant.evaluate.tasks.{module}"), cls)
    taken = {key: value for key, value in (options or {}).items() if key in kind.options}
    found = kind(**taken)
    assert isinstance(found, Task)
    return found
