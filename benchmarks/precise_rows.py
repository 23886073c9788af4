"""One precise row of a pass after the quantized product, on all multiprocessors, or beside it, on a few.

    python benchmarks/precise_rows.py

The linear layers of Qwen3-8B, four layers in a CUDA graph, replayed in turns; ms of a pass of 36. And
what the kernel draws from memory. Needs a Hopper GPU; vLLM is not needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from mixquant.kernels.few_rows_triton import few_rows

SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]  # out, in
LAYERS, OF = 4, 36
PRODUCTS = [(layer, which) for layer in range(LAYERS) for which in range(len(SHAPES))]
ALL = torch.cuda.get_device_properties().multi_processor_count
FEW = (2, 4, 8)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def medians(cases: dict[str, Callable[[], None]], rounds: int = 25) -> dict[str, float]:
    """ms of each, in turns, so that the GPU's clock is the same for all."""
    graphs = {name: captured(work) for name, work in cases.items()}
    for graph in graphs.values():
        for _ in range(20):
            graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(its) for name, its in times.items()}


def compared(
    rows: int, weights: list[list[Tensor]], copies: list[list[tuple[Tensor, Tensor]]]
) -> list[float]:
    """ms of a pass's linear layers: quantized alone, then the precise row, and beside it on `FEW`."""
    side = torch.cuda.Stream()
    x = {k: torch.randn(rows, k, device="cuda").bfloat16() for k in (4096, 12288)}
    codes = {k: quantized(its) for k, its in x.items()}
    outs = {n: torch.empty(rows, n, device="cuda").bfloat16() for n, _ in SHAPES}

    def multiply(layer: int, which: int, upto: int) -> None:
        n, k = SHAPES[which]
        (its, scale), (weight, weight_scale) = codes[k], copies[layer][which]
        torch._scaled_mm(
            its[:upto],
            weight.t(),
            scale[:upto],
            weight_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=outs[n][:upto],
        )

    def precise(layer: int, which: int, programs: int) -> None:
        n, k = SHAPES[which]
        few_rows(x[k][-1:], weights[layer][which], outs[n][-1:], programs)

    def after(programs: int) -> Callable[[], None]:
        def run() -> None:
            for layer, which in PRODUCTS:
                multiply(layer, which, rows)
                if programs:
                    precise(layer, which, programs)

        return run

    def beside(programs: int) -> Callable[[], None]:
        def run() -> None:
            main = torch.cuda.current_stream()
            for layer, which in PRODUCTS:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    precise(layer, which, programs)
                multiply(layer, which, rows - 1)
                main.wait_stream(side)

        return run

    cases = {"alone": after(0), "then": after(ALL), **{str(n): beside(n) for n in FEW}}
    return [ms * OF / LAYERS for ms in medians(cases).values()]


def main() -> None:
    torch.manual_seed(0)
    weights = [
        [torch.randn(n, k, device="cuda").mul_(k**-0.5).bfloat16() for n, k in SHAPES]
        for _ in range(LAYERS)
    ]
    copies = [[quantized(weight) for weight in layer] for layer in weights]
    row, out = torch.randn(1, 4096).bfloat16().cuda(), torch.empty(1, 24576).bfloat16().cuda()

    def reading(programs: int) -> Callable[[], None]:
        def run() -> None:
            for layer in weights:
                few_rows(row, layer[2], out, programs)

        return run

    print("| programs | GB/s |\n| --- | --- |")
    for programs, ms in medians({str(n): reading(n) for n in (*FEW, ALL)}).items():
        print(f"| {programs} | {LAYERS * weights[0][2].nbytes / ms / 1e6:.0f} |")
    print(
        f"\n| rows | quantized alone | then precise | {' | '.join(f'beside, {n}' for n in FEW)} |"
    )
    print("| --- " * (3 + len(FEW)) + "|")
    for rows in (2048, 4096, 8192):
        cells = " | ".join(f"{ms:.1f}" for ms in compared(rows, weights, copies))
        print(f"| {rows} | {cells} |")


if __name__ == "__main__":
    main()
