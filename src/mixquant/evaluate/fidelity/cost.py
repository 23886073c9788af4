"""The cost of a recipe: the arithmetic of prefill's linear layers, by format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mixquant.core.summary import Layer
from mixquant.results import Cost

BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nvfp4": 4.5}
"""Of a weight as it is multiplied. NVFP4: four, and a scale of eight for every 16 weights; the scales
of FP8 and INT8, one for each row of the weight, are too few to count."""

_EXPERT = re.compile(r"(^|\.)experts(\.(?P<number>\d+))?(\.|$)")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


def cost(arm: str, layers: Iterable[Layer], config: Mapping[str, Any], head: str | None) -> Cost:
    """The share of each format in the multiply-adds of a prompt token.

    Counted are the layers of a quantized row, whatever number of rows the thresholds keep precise.
    The output head is left out: prefill multiplies one row of a prompt with it, the last. Of a
    mixture's experts those count that a token meets.

    Args:
        layers: of a `Summary`.
        config: the model's config.json.
        head: the name of the output head.

    Raises:
        ValueError: there are no layers.
    """
    layers = [layer for layer in layers if layer.name not in (head, "lm_head")]
    met = _experts_per_token(config)
    experts = {
        found["number"]
        for layer in layers
        if (found := _EXPERT.search(layer.name)) and found["number"] is not None
    }
    work: dict[str, float] = {}
    for layer in layers:
        *stacked, out_features, in_features = layer.shape
        times = 1.0
        if found := _EXPERT.search(layer.name):
            if stacked:
                times = min(met or stacked[0], stacked[0])
            elif found["number"] is not None:
                times = min(met or len(experts), len(experts)) / len(experts)
        work[layer.format] = work.get(layer.format, 0.0) + times * out_features * in_features
    total = sum(work.values())
    if not total:
        raise ValueError("a cost needs linear layers")
    share = {name: work[name] / total for name in BITS if name in work}
    return Cost(arm=arm, share=share, bits=sum(BITS[name] * part for name, part in share.items()))


def cost_of_bf16(arm: str) -> Cost:
    return Cost(arm=arm, share={"bf16": 1.0}, bits=BITS["bf16"])


def _experts_per_token(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for values in (text if isinstance(text, dict) else {}, config):
        for name in _EXPERTS_PER_TOKEN:
            if isinstance(count := values.get(name), int) and count > 0:
                return count
    return None
