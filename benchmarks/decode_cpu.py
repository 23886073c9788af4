"""A decode step on a CPU behind a long prompt: stock SDPA against `mixquant_sdpa`, in one run.

    python benchmarks/decode_cpu.py --json benchmarks/results/decode_cpu.json
    python benchmarks/decode_cpu.py --show benchmarks/results/decode_cpu.json

The demo's model in BF16; its cache holds random keys and values. The two take turns, step by step, so
that whatever else the machine does falls on both; reported is the median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

import mixquant  # noqa: F401 - registers mixquant_sdpa
from mixquant.checkpoints.models import find, load_model

IMPLEMENTATIONS = ("sdpa", "mixquant_sdpa")
CACHED = (512, 3141, 7000)
STEPS = 20


def measure(cached: int) -> dict[str, float]:
    """Median seconds of a step behind so many tokens, by attention implementation."""
    model = load_model(find("smollm2"), torch.bfloat16)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    filled: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, cached, size)
        key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        filled.append((key, value))
    caches = {}
    for name in IMPLEMENTATIONS:
        caches[name] = DynamicCache(config=config)
        for layer, (key, value) in enumerate(filled):
            caches[name].update(key, value, layer)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    token = torch.tensor([[7]])
    for step in range(STEPS + 2):
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            start = time.perf_counter()
            model(input_ids=token, past_key_values=caches[name], use_cache=True)
            if step >= 2:  # warm
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(file: Path) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| cached tokens | sdpa (ms) | mixquant_sdpa (ms) | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for result in json.loads(file.read_text())["results"]:
        stock, ours = (result["step_s"][name] for name in IMPLEMENTATIONS)
        lines.append(
            f"| {result['cached']} | {stock * 1e3:.1f} | {ours * 1e3:.1f} | {stock / ours:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--show", type=Path, help="print the table of a results file, and end")
    arguments = parser.parse_args()
    if arguments.show:
        print(show(arguments.show))
        return
    transformers.utils.logging.disable_progress_bar()
    results = []
    with torch.no_grad():
        for cached in CACHED:
            results.append({"cached": cached, "step_s": measure(cached)})
            print(results[-1], flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": os.getloadavg(),
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
