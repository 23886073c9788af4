"""How far attention in FP8 is from attention in FP32, on random and on a real model's Q, K and V.

    python benchmarks/attention_error.py --model smollm2 --tokens 4096 [--json FILE]

Relative errors ‖out - exact‖ / ‖exact‖ of causal attention over a whole prompt, for each layer. On
Hopper FP8 is what serving runs (fa3-fwd) and BF16 vLLM's FlashAttention; elsewhere both are emulated:
Q, K, V and the probabilities rounded to E4M3 or BF16, sums in FP32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixquant import models

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 256  # whose scores are in memory at a time


def in_e4m3(x: Tensor) -> Tensor:
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, rounded: Any = None) -> Tensor:
    """Causal attention of ``[tokens, heads, size]`` in FP32, its operands rounded first if asked."""
    rounded = rounded or (lambda x: x.float())
    groups = q.shape[1] // k.shape[1]
    q, k, v = (rounded(x).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], ROWS):
        stop = min(start + ROWS, q.shape[1])
        scores = q[:, start:stop] @ k[:, :stop].transpose(1, 2) * scale
        later = torch.arange(stop) > torch.arange(start, stop)[:, None]
        scores.masked_fill_(later.to(q.device), -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out[:, start:stop] = rounded(weights) @ v[:, :stop] / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1)


def errors(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, float]:
    """Relative errors of BF16 and FP8 attention of BF16 ``[tokens, heads, size]``."""
    exact = attention(q, k, v, scale)
    if ON_HOPPER:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        from mixquant.engines.vllm.attention import flash_attention

        ends = torch.tensor([0, len(q)], device=q.device, dtype=torch.int32)
        lengths = {"max_seqlen_q": len(q), "max_seqlen_k": len(q)}
        lengths |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options = {"softmax_scale": scale, "causal": True, "fa_version": 3}
        bf16 = flash_attn_varlen_func(q, k, v, **lengths, **options)
        fp8 = torch.full_like(q, torch.nan)
        codes = [in_e4m3(x).to(torch.float8_e4m3fn)[None] for x in (q, k, v)]
        flash_attention(*codes, scale, fp8[None])
    else:
        bf16 = attention(q, k, v, scale, lambda x: x.bfloat16().float())
        fp8 = attention(q, k, v, scale, in_e4m3)
    return {
        name: ((out.float() - exact).norm() / exact.norm()).item()
        for name, out in (("bf16", bf16), ("fp8", fp8))
    }


def layers_of(name: str, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Q, K, V ``[tokens, heads, size]`` and the scale of each layer, reading Python's documentation."""
    found: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        found.append((q, k, v, more["scaling"]))
        return attention(q, k, v, more["scaling"]).to(q.dtype)[None], None

    ALL_ATTENTION_FUNCTIONS.register("watched", watched)
    checkpoint = models.find(name, print)
    model = models.load_model(checkpoint, device=DEVICE)
    model.set_attn_implementation("watched")
    text = models.load_tokenizer(checkpoint)("\n".join(topics.values()))["input_ids"][:tokens]
    with torch.no_grad():
        model.model(torch.tensor([text], device=DEVICE))
    return iter(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    torch.manual_seed(0)
    random = [torch.randn(options.tokens, n, 128, device=DEVICE).bfloat16() for n in (32, 8, 8)]
    rows = {"random": [errors(*random, 128**-0.5)]}  # type: ignore[arg-type]
    rows[options.model] = [errors(*layer) for layer in layers_of(options.model, options.tokens)]
    how = "fa3-fwd and vLLM's FlashAttention" if ON_HOPPER else "emulated"
    print(f"{options.tokens} tokens, {how}\n\n| Q, K, V | | lowest | median | highest |")
    print("| --- | --- | --- | --- | --- |")
    for name, layers in rows.items():
        for fmt in ("bf16", "fp8"):
            of = [layer[fmt] for layer in layers]
            cells = " | ".join(f"{x:.4f}" for x in (min(of), statistics.median(of), max(of)))
            print(f"| {name} | {fmt} | {cells} |")
    if options.json:
        options.json.write_text(json.dumps({"tokens": options.tokens, "how": how, **rows}) + "\n")


if __name__ == "__main__":
    main()
