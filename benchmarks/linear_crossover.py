"""From how many rows on a pass's linear layers take less time in FP8 than in BF16.

    python benchmarks/linear_crossover.py --model benchmarks/models/qwen3-8b [--json FILE]
    python benchmarks/linear_crossover.py --show FILE

All linear layers of the model, with the norms and activations in front of them, replayed from CUDA
graphs: in BF16, as precise passes run them, and in FP8 with one precise row, as quantized passes do. The
precise row reads all BF16 weights, whatever the number of rows. Needs Hopper and vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import command_line
from torch import Tensor

from mixquant.engines.vllm.linear.fp8_layer import Fp8Layer
from mixquant.engines.vllm.linear.route import StaticRoute
from mixquant.engines.vllm.products.scaled import ScaledProduct
from mixquant.kernels.triton import FEW_ROWS

ROWS = (512, 640, 704, 768, 832, 896, 1024, 1280, 1536, 2048, 4096)


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of work that is replayed from a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def linear_layers(config: dict[str, Any]) -> dict[str, Fp8Layer]:
    """The linear layers of one decoder layer, with random weights, in the order of a pass."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    queries = config["num_attention_heads"] * size
    keys = config["num_key_value_heads"] * size
    shapes = {
        "qkv": (queries + 2 * keys, width),
        "o": (width, queries),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }
    layers = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[1] ** -0.5
        layers[name] = Fp8Layer(shape)
        layers[name].set_weights(weight, ScaledProduct("fp8", weight))
    for name in ("qkv", "gate_up"):
        layers[name].norm = torch.ones(width, device="cuda", dtype=torch.bfloat16), 1e-6
    layers["down"].activated = True
    return layers


class Pass:
    """The linear layers of a pass of so many rows; a random matrix stands for attention's output."""

    def __init__(self, decoder_layers: list[dict[str, Fp8Layer]], rows: int) -> None:
        self._layers = decoder_layers
        o = decoder_layers[0]["o"]
        self._x, self._residual, self._total = (
            torch.randn(rows, o.features, device="cuda").bfloat16() for _ in range(3)
        )
        self._attended = torch.randn(rows, o.width, device="cuda").bfloat16()
        index = torch.full((FEW_ROWS,), -1, dtype=torch.int64, device="cuda")
        numbers = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
        index[0], numbers[rows - 1] = rows - 1, 0
        self._route = StaticRoute(rows, index, numbers)

    def bf16(self) -> Tensor:
        def product(layer: Fp8Layer, x: Tensor, *residual_and_total: Tensor | None) -> Tensor:
            return F.linear(layer.precise_input(x, *residual_and_total), layer.weight)

        return self._run(product)

    def fp8(self) -> Tensor:
        def product(
            layer: Fp8Layer, x: Tensor, residual: Tensor | None, total: Tensor | None
        ) -> Tensor:
            return layer.multiplied(x, residual, self._route, total)

        return self._run(product)

    def _run(self, product: Callable[..., Tensor]) -> Tensor:
        x = self._x
        for of in self._layers:
            product(of["qkv"], x, self._residual, self._total)
            x = product(of["o"], self._attended, None, None)
            x = product(of["gate_up"], x, self._residual, self._total)
            x = product(of["down"], x, None, None)
        return x


def table(found: dict[str, Any]) -> str:
    """Both times, and BF16's over FP8's."""
    lines = ["| rows | bf16 (ms) | fp8 with a precise row (ms) | bf16 / fp8 |", "| --- " * 4 + "|"]
    for row in found["rows"]:
        bf16, fp8 = row["bf16_ms"], row["fp8_ms"]
        lines.append(f"| {row['tokens']} | {bf16:.2f} | {fp8:.2f} | {bf16 / fp8:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory with a config.json")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's table")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    if options.model is None:
        parser.error("--model is needed, a directory with a config.json")
    import vllm._custom_ops  # noqa: F401  # registers the operators

    config = json.loads((options.model / "config.json").read_text())
    torch.manual_seed(0)
    # Each layer has weights of its own: none may be in the GPU's cache already.
    layers = [linear_layers(config) for _ in range(config["num_hidden_layers"])]
    rows = []
    for count in ROWS:
        one = Pass(layers, count)
        times = {"bf16_ms": milliseconds(one.bf16), "fp8_ms": milliseconds(one.fp8)}
        rows.append({"tokens": count, **{name: round(ms, 3) for name, ms in times.items()}})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    found = {
        "command": command_line(options.json),
        "device": torch.cuda.get_device_name(),
        "rows": rows,
    }
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
