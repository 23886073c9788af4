"""A real model that runs fast: the first layers of SmolLM2, and prompts of real text."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from this_machine import ON_GPU
from transformers import AutoTokenizer

LAYERS = 6

# In order of their numbers: many and few tokens mixed, some below the default threshold.
LENGTHS = (511, 300, 37, 129, 700, 64, 200, 450, 90, 33, 256, 150, 1000, 80, 60, 400)

# Two runs' distributions may differ by the order of sums, which depends on the shapes of a pass: in
# BF16, and in FP8 on a GPU. INT8 products themselves do not. So much of what quantizing does to them,
# summed over the requests, is the same; were it near one, these tests would hold without a plugin.
# Of what quantization changes, so much may a request's company change: on a GPU libraries choose kernels
# by the number of rows, for the precise rows, too (0.24 was seen on an H200, in chunks of 256), and in
# AVX2 vLLM's attention adds up in an order that chunks change: 13 of 16 requests answer exactly the same
# in chunks of 64, the others as if quantized anew (0.13 in all).
SAME = 0.4 if ON_GPU else 0.1 if torch.cpu._is_avx512_supported() else 0.25
# The one that is compared with itself alone may be among these others (0.40, in chunks of 256).
SAME_ALONE = SAME if ON_GPU or torch.cpu._is_avx512_supported() else 0.6


def first_layers(model: str, folder: Path, count: int = LAYERS) -> str:
    """A checkpoint of a Llama's first layers, with its embeddings, last norm and tokenizer.

    Its answers are nonsense. Its weights and activations are a trained model's, with their outliers,
    and take a fraction of the time.
    """
    source = Path(model)
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    deeper = tuple(f"model.layers.{n}." for n in range(count, config["num_hidden_layers"]))
    kept = {name: one for name, one in weights.items() if not name.startswith(deeper)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (folder / file.name).symlink_to(file)
    return str(folder)


def text_prompts(model: str) -> list[list[int]]:
    """Token ids of the standard library's documentation, of as many tokens as `LENGTHS` says."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer("\n".join(topics.values())[:60_000])["input_ids"]
    starts = range(0, len(text), len(text) // len(LENGTHS))
    return [text[start : start + count] for start, count in zip(starts, LENGTHS, strict=False)]


def engine(model: str, runs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """An engine for `vllm_engines.results_of`, which keeps no prefix cache unless told to."""
    usual = {"max_model_len": 2048, "enable_prefix_caching": False}
    return {"model": model, "options": {**usual, **options}, "runs": runs}


def layers_of(model: str) -> int:
    """How many hidden layers a checkpoint has."""
    return int(json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"])


def assert_products_were_planned(engine: dict[str, Any], model: str) -> None:
    """Every layer multiplied with its copy in each pass that has quantized rows, and in no other.

    A plan that no layer follows, for a wrong number of rows say, would leave everything in BF16.
    """
    layers = 4 * layers_of(model)  # qkv, o, gate and up, down
    for run in engine.values():
        assert run["products"].get("linear", 0) == launched(run) * layers


def launched(run: dict[str, Any]) -> int:
    """How many quantized passes launched their products: a captured graph did when it was captured."""
    return sum(bool(one["quantized"]) and "graph" not in one["kind"] for one in run["passes"])
