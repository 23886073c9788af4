"""Prints a results file as a Markdown table, as docs/results/index.md shows it.

    python scripts/results_table.py benchmarks/results/compare_cpu_amx.json

For files of `mixquant compare`, `mixquant fidelity`, `mixquant tune` and `benchmarks/linear_cpu.py`. The
other benchmarks print their own with ``--show FILE``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def comparison(values: dict[str, Any]) -> Iterable[list[str]]:
    yield ["arm", "prefill tok/s", "speed-up", "TTFT (s)", "TPOT (ms)", "KL", "top-1", "extra MiB"]
    reference = values["arms"][0]
    for arm in values["arms"]:
        speed = arm["prefill_tokens_per_s"]
        yield [
            arm["name"],
            f"{speed:.0f}",
            f"{speed / reference['prefill_tokens_per_s']:.2f}",
            f"{arm['ttft_s']:.2f}",
            f"{arm['tpot_s'] * 1e3:.1f}",
            f"{arm['kl_mean']:.4f}",
            f"{arm['top1_agreement']:.1%}",
            f"{arm['extra_bytes'] / 2**20:.1f}",
        ]


def fidelity(values: dict[str, Any]) -> Iterable[list[str]]:
    heading = ["bits", "rows", "KL mean", "KL 99 %", "KL max", "top-1", "perplexity", "same"]
    several = len({one["prompt_tokens"] for one in values["results"]}) > 1
    yield ["arm", *["tokens"] * several, *heading]
    bits = {cost["arm"]: f"{cost['bits']:.1f}" for cost in values["costs"]}
    for one in values["results"]:
        yield [
            one["arm"],
            *[f"{one['prompt_tokens']:,}"] * several,
            bits.get(one["arm"], "-"),
            f"{one['quantized_share']:.1%}",
            f"{one['kl_mean']:.4f}",
            f"{one['kl_p99']:.3f}",
            f"{one['kl_max']:.3f}",
            f"{one['top1']:.1%}",
            f"{one['perplexity']:.2f}",
            f"{one['identical_tokens']:.1f}",
        ]


def tuning(values: dict[str, Any]) -> Iterable[list[str]]:
    yield ["arm", "time", "bits", "KL predicted", "searched", "held out", "recovered"]

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for one in values["tried"]:
        yield [
            one["arm"],
            shown(one["time"], ".3f"),
            f"{one['bits']:.2f}",
            *(shown(one[name], ".4f") for name in ("predicted", "searched", "held_out")),
            shown(one["recovered"], ".1%"),
        ]


def linear(values: dict[str, Any]) -> Iterable[list[str]]:
    """INT8 against the faster of FP32 and BF16."""
    rows = sorted({one["rows"] for one in values["results"]})
    yield ["layer", *map(str, rows)]
    for layer in dict.fromkeys(one["layer"] for one in values["results"]):
        found = {one["rows"]: one for one in values["results"] if one["layer"] == layer}
        yield [
            layer,
            *(
                f"{min(one['fp32_us'], one['bf16_us']) / one['int8_us']:.2f}"
                for one in (found[count] for count in rows)
            ),
        ]


def table(values: dict[str, Any]) -> str:
    """The table of a results file, as Markdown."""
    known = {"comparison": comparison, "fidelity": fidelity, "tuning": tuning}
    make = known.get(values.get("kind", ""), linear)
    heading, *rows = make(values)
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
