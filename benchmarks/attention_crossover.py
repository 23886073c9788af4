"""From how many new tokens behind how many cached ones on FP8 attention takes less time than BF16's.

    python benchmarks/attention_crossover.py --model benchmarks/models/qwen3-8b [--json FILE]
    python benchmarks/attention_crossover.py --show FILE

One layer's attention of a chunk to all keys up to its last, in pages of 16: vLLM's FlashAttention in
BF16, and what serving does in FP8: codes, product, merge, and BF16 attention of one precise row. As many
layers in a row as the model has, so that what is bound by launching shows. The table has BF16's time
over FP8's; bold are the cells where serving attends in FP8. Needs Hopper, vLLM and fa3-fwd.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from command_line import command_line
from torch import Tensor

from mixquant.engines.vllm.attention.fp8 import Run, Shape, attend
from mixquant.engines.vllm.attention.rows import AttentionPiece, runs_of, worth

PAGE = 16
ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
CACHED = (0, 2048, 8192, 32768, 98304)


def milliseconds(layer: Callable[[], object], layers: int) -> float:
    """The median time of a layer, of several passes of so many layers."""
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(layers):
            layer()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / layers)
    return statistics.median(times[2:])


class Layer:
    """A chunk, its cache, and both ways to attend."""

    def __init__(self, shape: Shape, rows: int, keys: int) -> None:
        device = torch.device("cuda")
        pages = -(-keys // PAGE)
        cache = torch.randn(pages, shape.kv_heads, PAGE, 2 * shape.size, device=device)
        self.keys, self.values = cache.bfloat16().transpose(1, 2).split(shape.size, -1)
        self.table = torch.randperm(pages, device=device).to(torch.int32)[None]
        self.query = torch.randn(rows, shape.heads, shape.size, device=device).bfloat16()
        self.own = torch.randn(2, rows, shape.kv_heads, shape.size, device=device).bfloat16()
        self.out = torch.empty_like(self.query)
        self.shape = shape
        pieces = runs_of(
            [AttentionPiece(0, 0, rows, keys)], SimpleNamespace(row_counts=np.array([rows]))
        )
        self.runs = [Run(run, device) for run in pieces]
        self.lengths = torch.tensor([keys], dtype=torch.int32, device=device)
        self.ends = {n: torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, rows)}
        self.most = keys

    def bf16(self, rows: int | None = None) -> Tensor:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        query = self.query if rows is None else self.query[-rows:]
        return flash_attn_varlen_func(  # type: ignore[no-any-return]
            query,
            self.keys,
            self.values,
            max_seqlen_q=len(query),
            cu_seqlens_q=self.ends[len(query)],
            max_seqlen_k=self.most,
            seqused_k=self.lengths,
            block_table=self.table,
            softmax_scale=self.shape.scale,
            causal=True,
            fa_version=3,
            out=self.out[: len(query)],
        )

    def fp8(self) -> None:
        cache = (self.keys, self.values)
        key, value = self.own
        for run in self.runs:
            attend(self.shape, run, self.query, key, value, cache, self.table, self.out)
        if self.runs[0].has_context:  # otherwise the precise row attends with the others
            self.bf16(1)


def table(found: dict[str, Any]) -> str:
    """BF16's time over FP8's, and what is decided."""
    rows = found["rows"]
    shape = (found["heads"], found["kv_heads"], found["head_size"])
    cached = sorted({row["cached"] for row in rows})
    lines = ["| new tokens | " + " | ".join(f"{c} cached" for c in cached) + " |"]
    lines.append("| --- " * (1 + len(cached)) + "|")
    for new in sorted({row["tokens"] for row in rows}):
        cells = []
        for behind in cached:
            (row,) = (r for r in rows if (r["tokens"], r["cached"]) == (new, behind))
            ratio = f"{row['bf16_ms'] / row['fp8_ms']:.2f}"
            cells.append(f"**{ratio}**" if worth(new, behind + new, *shape) else ratio)
        lines.append(f"| {new} | " + " | ".join(cells) + " |")
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
    config = json.loads((options.model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    shape = Shape(heads, kv_heads, size, size**-0.5)
    torch.manual_seed(0)
    rows = []
    for cached in CACHED:
        for new in ROWS:
            layer = Layer(shape, new, cached + new)
            bf16 = milliseconds(layer.bf16, config["num_hidden_layers"])
            fp8 = milliseconds(layer.fp8, config["num_hidden_layers"])
            times = {"bf16_ms": round(bf16, 4), "fp8_ms": round(fp8, 4)}
            rows.append({"tokens": new, "cached": cached, **times})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    found = {
        "command": command_line(options.json),
        "device": torch.cuda.get_device_name(),
        "heads": heads,
    }
    found |= {"kv_heads": kv_heads, "head_size": size, "rows": rows}
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
