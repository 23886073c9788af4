"""Attention on the CPU: PyTorch's SDPA in BF16 against our kernel in BF16 and INT8, in one run.

    python benchmarks/attention_cpu.py --json benchmarks/results/attention_cpu.json

Speed at the shape of SmolLM2-135M (9 heads of 64 over 3 KV heads), on random values: operations per
second of a core's time, so that other work on the machine counts little. The three take turns. Errors on
the queries, keys and values of SmolLM2-135M's 30 layers as they read Python's documentation, against
FP32, of rows from all over the prompt: the mean of the layers, and the worst one.

    python benchmarks/attention_cpu.py --show FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting takes no time of a core

import torch
from linear_cpu import processor
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mixquant.kernels.cpu import attention

HEADS, KV_HEADS, SIZE = 9, 3, 64
TOKENS = (513, 3141, 8192)
ERROR_TOKENS = (3141, 8192)
ROUNDS = 7
STDERR = Console(stderr=True)
ROWS = 256  # of each head, whose error is taken


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


def ours(q: Tensor, k: Tensor, v: Tensor, precision: attention.Precision) -> Tensor:
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype).transpose(1, 2)
    attention.attend(q, k, v, [(0, q.shape[2])], [0], q.shape[3] ** -0.5, precision, out)
    return out


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": sdpa,
    "bf16": lambda q, k, v: ours(q, k, v, "bf16"),
    "int8": lambda q, k, v: ours(q, k, v, "int8"),
}
LABELS = {"sdpa": "SDPA", "bf16": "ours, BF16", "int8": "ours, INT8"}
if not torch.cpu._is_avx512_bf16_supported():
    del KERNELS["bf16"]


def speed(tokens: int) -> dict[str, float]:
    """GFLOP/s of one core in causal attention over so many tokens, by kernel, in the median round."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, SIZE, generator=generator).bfloat16().transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for round_ in range(ROUNDS + 1):
        for name, kernel in KERNELS.items():
            start = time.process_time()  # of all threads together
            kernel(q, k, v)
            if round_:  # warm
                seconds[name].append(time.process_time() - start)
    operations = 4 * SIZE * HEADS * tokens * (tokens + 1) / 2
    return {
        name: round(operations / statistics.median(took) / 1e9, 1) for name, took in seconds.items()
    }


def errors(tokens: int) -> dict[str, list[float]]:
    """The relative error of each of SmolLM2's layers, by kernel."""
    from pydoc_data.topics import topics

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from mixquant.checkpoints.models import find, load_model, load_tokenizer

    checkpoint = find("smollm2", print)
    ids = load_tokenizer(checkpoint)("".join(topics.values()))["input_ids"][:tokens]
    assert len(ids) == tokens
    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def measure(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = (
            torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values
        )
        wanted = in_fp32(q, k, v, rows)
        made = {name: kernel(q, k, v) for name, kernel in KERNELS.items()}
        for name, of in made.items():
            error = (of[:, :, rows].float() - wanted).norm() / wanted.norm()
            found[name].append(round(float(error), 5))
        return made["sdpa"].transpose(1, 2).contiguous(), None  # what the model goes on with

    ALL_ATTENTION_FUNCTIONS.register("sdpa", measure)
    load_model(checkpoint, torch.bfloat16)(torch.tensor([ids]), logits_to_keep=1)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", stock)
    return found


def in_fp32(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q[:, :, rows].float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2]) > rows[:, None]
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: speed, and beside it the mean error and that of the worst layer."""
    names = list(next(iter(report["gflops"].values())))
    heading = ["tokens", *(LABELS[name] for name in names), "INT8 / SDPA"]
    heading += [f"error, {LABELS[name]}" for name in names]
    lines = [heading, ["---"] * len(heading)]
    for tokens, rate in report["gflops"].items():
        wrong = report["errors"].get(tokens, {})
        said = [
            f"{statistics.mean(wrong[name]):.4f}, {max(wrong[name]):.4f}" if wrong else "-"
            for name in names
        ]
        rates = [f"{rate[name]:.0f}" for name in names]
        lines.append([tokens, *rates, f"{rate['int8'] / rate['sdpa']:.2f}", *said])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--no-errors", action="store_true", help="speed only, without a model")
    parser.add_argument("--show", type=Path, help="print this file's table, measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
        return
    if (reason := attention.why_unavailable("int8")) is not None:
        parser.error(f"the kernel does not run here: {reason}")

    with torch.inference_mode():
        rates = {tokens: speed(tokens) for tokens in track(TOKENS, "Timing", console=STDERR)}
        wrong = {}
        if not arguments.no_errors:
            wrong = {
                tokens: errors(tokens) for tokens in track(ERROR_TOKENS, "Errors", console=STDERR)
            }

    report = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vnni": torch.cpu._is_vnni_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "gflops": {str(tokens): rate for tokens, rate in rates.items()},
        "errors": {str(tokens): of for tokens, of in wrong.items()},
    }
    print(table(report))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
