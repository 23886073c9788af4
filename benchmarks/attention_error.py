"""How far FP8 attention is from attention in FP32, as serving calls it, on made-up and on real Q, K, V.

    python benchmarks/attention_error.py [--keys 4096,32768,131072] [--model smollm2] [--json FILE]
    python benchmarks/attention_error.py --following [--keys 4096,32768] [--json FILE]
    python benchmarks/attention_error.py --show FILE

A chunk of a prompt attends to itself and to the keys before it, which lie in the pages of a cache. On
Hopper this is what serving runs (Triton's kernels and fa3-fwd). Elsewhere it is emulated in PyTorch,
with sums as Hopper's tensor cores make them: slow, so give `--keys 4096`. Columns: `error`, that of the
output over the output's norm; `ideal`, the same of the same codes with FP32 sums; `of V`, the error's
root mean square over that of V; `bf16`, `error` of vLLM's BF16 attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import attention_reference as reference
import numpy as np
import torch
from command_line import command_line
from torch import Tensor

from mixquant.engines.vllm.attention import fp8 as fp8_attention
from mixquant.engines.vllm.attention.fp8 import Run, Shape, attend
from mixquant.engines.vllm.attention.rows import AttentionPiece, runs_of

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
SEGMENTS = 1024  # tokens of a drifting mean


@dataclass(frozen=True)
class Inputs:
    """One layer's attention in one pass: sequences, each with all of its keys and its last queries."""

    q: list[Tensor]  # [rows, heads, size] BF16 each
    k: list[Tensor]  # [keys, kv_heads, size] BF16
    v: list[Tensor]
    scale: float


def no_mean(keys: int, heads: int, size: int) -> Tensor:
    return torch.zeros(1, heads, size)


def constant(deviations: float) -> Any:
    return lambda keys, heads, size: deviations * torch.randn(1, heads, size)


def drifting(keys: int, heads: int, size: int) -> Tensor:
    means = torch.randn(-(-keys // SEGMENTS), heads, size)
    return means.repeat_interleave(SEGMENTS, 0)[:keys]


def two_halves(keys: int, heads: int, size: int) -> Tensor:
    return torch.where(torch.arange(keys) < 0.45 * keys, 1.0, -1.0)[:, None, None].expand(
        keys, heads, size
    )


def walking(keys: int, heads: int, size: int) -> Tensor:
    return (torch.randn(keys, heads, size) * 2 * keys**-0.5).cumsum(0)


# The mean of V, in standard deviations, along a prompt.
MEANS = {
    "no mean": no_mean,
    "mean 0.2": constant(0.2),
    "mean 1": constant(1.0),
    "another mean each 1,024 keys": drifting,
    "1, then -1": two_halves,
    "random walk": walking,
}
SINKS = {f"mean 1, sink {nats} nats above": nats for nats in (8, 11, 14)}
CASES = [*MEANS, *SINKS, "mean 1, scores nearly equal", "mean 1, outliers in Q and K"]


def in_the_second_part(keys: int) -> Tensor:
    return torch.arange(keys) >= 0.55 * keys


def in_three_of_ten(keys: int) -> Tensor:
    return torch.rand(keys) < 0.3


# Keys that all queries attend to more than to others, and how many nats more. Their values have the mean
# 1, those of the others -1: what is attended to is not what the mean over all keys is of.
FOLLOWING = {
    "attended to: the second part of the keys": (in_the_second_part, 6.0),
    "attended to: 3 of 10 keys": (in_three_of_ten, 3.0),
}


def made_up(
    case: str,
    sequences: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    size: int,
    sink: int = 0,
) -> Inputs:
    """Random Q, K and V.

    Args:
        case: one of `CASES` or of `FOLLOWING`.
        sequences: how many rows, and keys, of each.
        sink: the key that is one, in cases that have one.
    """
    means = MEANS.get(case, MEANS["mean 1"])
    inputs = Inputs([], [], [], size**-0.5)
    for rows, keys in sequences:
        q = torch.randn(rows, heads, size)
        k = torch.randn(keys, kv_heads, size)
        v = torch.randn(keys, kv_heads, size) + means(keys, kv_heads, size)
        if case in SINKS:
            # All queries have a part in one direction, and one key is all in that direction.
            direction = torch.nn.functional.normalize(torch.randn(size), dim=0)
            q += 2 * size**0.5 * direction
            k -= (k @ direction)[..., None] * direction
            k[sink] = SINKS[case] / 2 * direction
            v[sink] *= 0.02  # as of real ones
        if case in FOLLOWING:
            chosen, nats = FOLLOWING[case]
            those = chosen(keys)[:, None, None]
            direction = torch.nn.functional.normalize(torch.randn(size), dim=0)
            for x in (q, k):
                x -= (x @ direction)[..., None] * direction
            q += size**0.5 * direction
            k += nats * those * direction
            v = torch.randn(keys, kv_heads, size) + torch.where(those, 1.0, -1.0)
        if case.endswith("nearly equal"):
            q *= 0.1
        if case.endswith("outliers in Q and K"):
            k[..., :2] *= 4
            q[..., :2] *= 4
        inputs.q.append(q.bfloat16().to(DEVICE))
        inputs.k.append(k.bfloat16().to(DEVICE))
        inputs.v.append(v.bfloat16().to(DEVICE))
    return inputs


def served(inputs: Inputs) -> list[Tensor]:
    """FP8 attention of each sequence's queries, out of pages in disorder, as serving computes it."""
    lengths = [len(k) for k in inputs.k]
    (kv_heads, size), heads = inputs.k[0].shape[1:], inputs.q[0].shape[1]
    width = -(-max(lengths) // PAGE)
    table = torch.randperm(len(lengths) * width + 3)[: len(lengths) * width]
    table = table.view(len(lengths), width).to(DEVICE, torch.int32)
    cache = torch.full(
        (len(lengths) * width + 3, kv_heads, PAGE, 2 * size), torch.nan, device=DEVICE
    ).bfloat16()
    keys, values = cache.transpose(1, 2).split(size, -1)  # as vLLM has it from 0.26 on
    for row, k, v in zip(table, inputs.k, inputs.v, strict=True):
        at = torch.arange(len(k), device=DEVICE)
        keys[row[at // PAGE].long(), at % PAGE] = k
        values[row[at // PAGE].long(), at % PAGE] = v

    query = torch.cat(inputs.q)
    key, value = (
        torch.cat([x[-len(q) :] for x, q in zip(of, inputs.q, strict=True)])
        for of in (inputs.k, inputs.v)
    )
    counts = [len(q) for q in inputs.q]
    ends = np.cumsum(counts)
    pieces = [
        AttentionPiece(number, int(end) - count, int(end), keys_)
        for number, (end, count, keys_) in enumerate(zip(ends, counts, lengths, strict=True))
    ]
    output = torch.full_like(query, torch.nan)
    shape = Shape(heads, kv_heads, size, inputs.scale)
    for run in runs_of(pieces, SimpleNamespace(row_counts=np.array(counts))):
        pages = (keys, values)
        attend(shape, Run(run, query.device), query, key, value, pages, table, output)
    return list(output.split(counts))


@contextmanager
def with_sums(flash_attention: Any) -> Iterator[None]:
    """Codes are multiplied by this in place of FlashAttention-3."""
    before, fp8_attention.flash_attention = fp8_attention.flash_attention, flash_attention
    try:
        yield
    finally:
        fp8_attention.flash_attention = before


@contextmanager
def emulated() -> Iterator[None]:
    """The kernels are those of the reference, and sums those of Hopper."""
    before, fp8_attention._kernels = fp8_attention._kernels, lambda: reference
    try:
        with with_sums(reference.summed_on_hopper):
            yield
    finally:
        fp8_attention._kernels = before


def errors(inputs: Inputs, with_bf16: bool = False) -> dict[str, float]:
    """`error`, `ideal` and `of_v`, as the head of this file says; of all sequences together."""
    exact = [
        reference.exact(q, k, v, inputs.scale)
        for q, k, v in zip(inputs.q, inputs.k, inputs.v, strict=True)
    ]
    wanted = torch.cat(exact)

    def of(found: list[Tensor]) -> float:
        return ((torch.cat(found).float() - wanted).norm() / wanted.norm()).item()

    error = of(served(inputs))
    with with_sums(reference.summed_exactly):
        ideal = of(served(inputs))
    v = torch.cat(inputs.v).float()
    of_v = error * (wanted.pow(2).mean().sqrt() / v.pow(2).mean().sqrt()).item()
    found = {"error": error, "ideal": ideal, "of_v": of_v}
    if with_bf16:
        found["bf16"] = of([bf16(*one) for one in zip(inputs.q, inputs.k, inputs.v, strict=True)])
    return found


def bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """vLLM's own attention."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    rows, keys = (torch.tensor([0, len(x)], device=q.device, dtype=torch.int32) for x in (q, k))
    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        q,
        k,
        v,
        max_seqlen_q=len(q),
        max_seqlen_k=len(k),
        cu_seqlens_q=rows,
        cu_seqlens_k=keys,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        fa_version=3,
    )


def within_bounds(found: dict[str, float]) -> bool:
    """Whether the kernels add no more than half of what the codes cost, or 0.002 of V."""
    return found["error"] <= 1.5 * found["ideal"] or found["of_v"] <= 0.002


def layers_of(name: str, tokens: int) -> Iterator[Inputs]:
    """What each layer attends to of a model that reads Python's documentation, in its last quarter."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from mixquant.checkpoints import models

    found: list[Inputs] = []

    def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        found.append(Inputs([q[-tokens // 4 :]], [k], [v], more["scaling"]))
        return reference.exact(q, k, v, more["scaling"]).to(q.dtype)[None], None

    ALL_ATTENTION_FUNCTIONS.register("watched", watched)
    checkpoint = models.find(name, print)
    model = models.load_model(checkpoint, device=DEVICE)
    model.set_attn_implementation("watched")
    text = models.load_tokenizer(checkpoint)("\n".join(topics.values()))["input_ids"][:tokens]
    with torch.no_grad():
        model.model(torch.tensor([text], device=DEVICE))
    return iter(found)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for a case and a head size, one column for a length."""
    lengths = sorted({row["keys"] for row in rows})
    lines = [
        "| V | heads | " + " | ".join(f"{keys} keys" for keys in lengths) + " |",
        "| --- " * (2 + len(lengths)) + "|",
    ]
    for key in dict.fromkeys((r["v"], r["heads"], r["kv_heads"], r["head_size"]) for r in rows):
        v, heads, kv_heads, size = key
        cells = []
        for keys in lengths:
            of = [
                row
                for row in rows
                if (row["v"], row["heads"], row["kv_heads"], row["head_size"]) == key
                and row["keys"] == keys
            ]
            cells.append(
                f"{of[0]['error']:.4f} ({of[0]['ideal']:.4f}; {of[0]['of_v']:.4f})" if of else ""
            )
        lines.append(f"| {v} | {heads} over {kv_heads} of {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", default="4096,32768,131072")
    parser.add_argument("--rows", type=int, default=128, help="queries at the end of the keys")
    parser.add_argument("--sizes", default="128", help="of a head")
    parser.add_argument(
        "--following",
        action="store_true",
        help="the cases in which attention follows V, in place of the others",
    )
    parser.add_argument(
        "--model", help="also a real model's, such as smollm2: a chunk of the last quarter"
    )
    parser.add_argument("--tokens", default="6144", help="which the model reads")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's table")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())["rows"]))
        return
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def record(v: str, inputs: Inputs) -> None:
        heads, size = inputs.q[0].shape[1:]
        kv_heads = inputs.k[0].shape[1]
        what = {"v": v, "keys": len(inputs.k[0]), "rows": len(inputs.q[0]), "heads": heads}
        what |= {"kv_heads": kv_heads, "head_size": size}
        found = {name: round(x, 6) for name, x in errors(inputs, ON_HOPPER).items()}
        rows.append({**what, **found})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    heads = (8, 2) if ON_HOPPER else (2, 1)
    with emulated() if not ON_HOPPER else with_sums(fp8_attention.flash_attention):
        for size in map(int, options.sizes.split(",")):
            for keys in map(int, options.keys.split(",")):
                for case in FOLLOWING if options.following else CASES:
                    record(case, made_up(case, [(min(options.rows, keys), keys)], *heads, size))
        for tokens in map(int, options.tokens.split(",")) if options.model else ():
            for number, layer in enumerate(layers_of(options.model, tokens)):
                record(f"{options.model}, layer {number}", layer)
    print(table(rows))
    if options.json:
        how = torch.cuda.get_device_name() if ON_HOPPER else "emulated"
        options.json.write_text(
            json.dumps(
                {"command": command_line(options.json), "device": how, "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
