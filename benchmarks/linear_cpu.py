"""Linear products on the CPU: FP32, BF16 and INT8 (its activation quantized on the fly), in one run.

    python benchmarks/linear_cpu.py --json benchmarks/results/linear_cpu.json

At the shapes of SmolLM2-135M and Qwen3-0.6B. The three types take turns, so that whatever else the
machine does falls on all of them; reported is the median time. INT8 is everything that a layer does
for a quantized row: quantize, multiply, rescale, with the row count that the plan would give it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixquant.formats import BY_NAME

SHAPES = {  # (out_features, in_features)
    "SmolLM2-135M q, o": (576, 576),
    "SmolLM2-135M k, v": (192, 576),
    "SmolLM2-135M gate, up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Qwen3-0.6B q": (2048, 1024),
    "Qwen3-0.6B k, v": (1024, 1024),
    "Qwen3-0.6B o": (1024, 2048),
    "Qwen3-0.6B gate, up": (3072, 1024),
    "Qwen3-0.6B down": (1024, 3072),
}
ROWS = (1, 128, 512, 2048)
ROUNDS = 15


def measure(out_features: int, in_features: int, rows: int) -> dict[str, float]:
    """Median seconds of one product ``[rows, in] x [in, out]``, by type."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    x = torch.randn(rows, in_features, generator=generator)
    weight_bf16, x_bf16 = weight.bfloat16(), x.bfloat16()
    int8 = BY_NAME["int8"]
    kernel = int8.kernel(torch.device("cpu"))
    quantized = int8.quantize_weight(weight_bf16, kernel)
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)

    def int8_product() -> None:
        int8.linear(int8.quantize_rows(x_bf16, kernel), quantized, None, out)

    runs: dict[str, Callable[[], object]] = {
        "fp32": lambda: torch.nn.functional.linear(x, weight),
        "bf16": lambda: torch.nn.functional.linear(x_bf16, weight_bf16),
        "int8": int8_product,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 3:  # warm
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args()

    results: list[dict[str, Any]] = []
    cases = [(name, shape, rows) for name, shape in SHAPES.items() for rows in ROWS]
    with torch.inference_mode():
        for name, (out_features, in_features), rows in track(cases, "Measuring"):
            seconds = measure(out_features, in_features, rows)
            results.append(
                {"layer": name, "shape": [out_features, in_features], "rows": rows}
                | {f"{key}_us": round(value * 1e6, 1) for key, value in seconds.items()}
            )

    table = Table(title="Linear products, Gop/s, quantization included")
    for heading in ("layer", "rows", "FP32", "BF16", "INT8", "INT8 vs faster of the two"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for result in results:
        out_features, in_features = result["shape"]
        operations = 2 * result["rows"] * out_features * in_features
        best = min(result["fp32_us"], result["bf16_us"])
        table.add_row(
            result["layer"],
            str(result["rows"]),
            *(f"{operations / result[f'{key}_us'] / 1e3:.0f}" for key in ("fp32", "bf16", "int8")),
            f"{best / result['int8_us']:.2f}x",
        )
    Console(width=100).print(table)

    if arguments.json:
        flags = {
            "vnni": torch.cpu._is_vnni_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        }
        report = {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernel": BY_NAME["int8"].kernel(torch.device("cpu")).name,
            **flags,
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
