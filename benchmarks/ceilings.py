"""What the GPU's products and attention alone allow: their rates, and the prefill times these add up to.

    python benchmarks/ceilings.py --model benchmarks/models/qwen3-8b

Measures the linear layers' shapes of a model (config.json) in BF16 (cuBLAS) and FP8 (vLLM's CUTLASS
kernels, with which the prefill is added up, and cuBLASLt; rows quantized beforehand), and causal
attention of a chunk in BF16 (vLLM's FlashAttention) and FP8 (fa3-fwd, codes made beforehand). A
prefill cannot be faster than its products and its attention. With --json, the rates of all the products
of a layer together, in BF16 and in FP8 by CUTLASS, are written for `mixquant tune --rates`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import vllm._custom_ops as ops
from triton.testing import do_bench  # type: ignore[import-not-found, import-untyped]
from vllm.vllm_flash_attn import flash_attn_varlen_func

from mixquant.engines.vllm.attention.fp8 import flash_attention
from mixquant.kernels.triton.fused import empty_codes, silu_and_mul

CHUNK = 8192


def median_ms(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def linear_ms(rows: int, shape: tuple[int, int]) -> tuple[float, float, float]:
    """ms of one product in BF16, and in FP8 by CUTLASS and by cuBLASLt."""
    features, width = shape
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(features, width, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, features, device="cuda", dtype=torch.bfloat16)
    codes, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    weight_codes, weight_scale = ops.scaled_fp8_quant(weight, use_per_token_if_dynamic=True)

    def fp8() -> None:
        torch.ops._C.cutlass_scaled_mm(out, codes, weight_codes.t(), scale, weight_scale, None)

    def cublas() -> None:
        torch._scaled_mm(
            codes,
            weight_codes.t(),
            scale,
            weight_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=out,
        )

    return (
        median_ms(lambda: torch.nn.functional.linear(x, weight)),
        median_ms(fp8),
        median_ms(cublas),
    )


def activation_ms(rows: int, width: int) -> tuple[float, float, float]:
    """ms of vLLM's SiLU-and-multiply, of its FP8 quantizer after it, and of ours, which is both."""
    x = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    codes = empty_codes("fp8", rows, width, x.device)
    return (
        median_ms(lambda: torch.ops._C.silu_and_mul(out, x)),
        median_ms(lambda: ops.scaled_fp8_quant(out, use_per_token_if_dynamic=True)),
        median_ms(lambda: silu_and_mul(x, codes)),
    )


def attention_ms(rows: int, keys: int, heads: int, kv_heads: int, size: int) -> tuple[float, float]:
    """ms of a chunk's attention to all keys up to its own in BF16 and in FP8."""
    q = torch.randn(rows, heads, size, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, keys, kv_heads, size, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, rows], device="cuda", dtype=torch.int32)
    of_keys = torch.tensor([0, keys], device="cuda", dtype=torch.int32)
    q8, k8, v8 = (tensor.to(torch.float8_e4m3fn)[None] for tensor in (q, k, v))
    out = torch.empty_like(q)[None]

    def bf16() -> None:
        flash_attn_varlen_func(
            q,
            k,
            v,
            rows,
            starts,
            keys,
            of_keys,
            softmax_scale=size**-0.5,
            causal=True,
            fa_version=3,
        )

    return median_ms(bf16), median_ms(lambda: flash_attention(q8, k8, v8, size**-0.5, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a directory with a config.json")
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument(
        "--json", type=Path, help="also write the products' rates, for mixquant tune --rates"
    )
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", hidden // heads)
    layers = config["num_hidden_layers"]
    shapes = [((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size)]
    shapes += [(2 * wide, hidden), (hidden, wide)]
    torch.manual_seed(0)

    print("| product | BF16 TFLOP/s | FP8, CUTLASS | FP8, cuBLASLt |\n| --- | --- | --- | --- |")
    linear: dict[int, tuple[float, ...]] = {}
    for rows in (2048, CHUNK):
        times = [linear_ms(rows, shape) for shape in shapes]
        for shape, ms in zip(shapes, times, strict=True):
            tflop = 2 * rows * shape[0] * shape[1] / 1e9
            cells = " | ".join(f"{tflop / one:.0f}" for one in ms)
            print(f"| {rows} x {shape[1]} x {shape[0]} | {cells} |")
        in_bf16, by_cutlass, by_cublas = zip(*times, strict=True)
        linear[rows] = sum(in_bf16), sum(by_cutlass), sum(by_cublas)
    if options.json is not None:
        tflop = sum(2 * CHUNK * features * width for features, width in shapes) / 1e9
        rates = dict(zip(("bf16", "fp8"), linear[CHUNK], strict=False))
        options.json.write_text(
            json.dumps({"tflops": {name: tflop / ms for name, ms in rates.items()}}, indent=2)
        )
    print("\n| rows x width | SiLU-and-multiply ms | quantizer ms | both in one kernel ms |")
    print("| --- | --- | --- | --- |")
    for rows in (2048, CHUNK):
        cells = " | ".join(f"{ms:.4f}" for ms in activation_ms(rows, wide))
        print(f"| {rows} x {wide} | {cells} |")
    print("\n| attention, rows x keys | BF16 TFLOP/s | FP8 TFLOP/s |\n| --- | --- | --- |")
    attention: dict[tuple[int, int], tuple[float, float]] = {}
    for rows, keys in ((2048, 2048), (CHUNK, CHUNK), (CHUNK, 4 * CHUNK), (CHUNK, 16 * CHUNK)):
        both = attention[rows, keys] = attention_ms(rows, keys, heads, kv_heads, size)
        tflop = 4 * rows * (keys - rows / 2) * heads * size / 1e9
        print(f"| {rows} x {keys} | " + " | ".join(f"{tflop / one:.0f}" for one in both) + " |")
    measured = sorted(keys for rows, keys in attention if rows == CHUNK)

    def of_chunk(keys: int, kind: int) -> float:
        """Attention's ms, between the lengths that were measured."""
        for low, high in pairwise(measured):
            if keys <= high:
                a, b = attention[CHUNK, low][kind], attention[CHUNK, high][kind]
                return a + (b - a) * (keys - low) / (high - low)
        raise SystemExit(f"{keys} tokens are more than were measured")

    print("\n| prefill | BF16 ms | FP8 products ms | and FP8 attention ms | ratio | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tokens in map(int, options.lengths.split(",")):
        if tokens < CHUNK:
            products, attend = linear[tokens], attention[tokens, tokens]
        else:
            chunks = range(CHUNK, tokens + 1, CHUNK)
            products = tuple(one * len(chunks) for one in linear[CHUNK])
            attend = tuple(sum(of_chunk(keys, kind) for keys in chunks) for kind in (0, 1))  # type: ignore[assignment]
        whole = layers * (products[0] + attend[0])
        fast = layers * (products[1] + attend[0]), layers * (products[1] + attend[1])
        print(
            f"| {tokens} | {whole:.1f} | {fast[0]:.1f} | {fast[1]:.1f} | {whole / fast[0]:.2f} "
            f"| {whole / fast[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
