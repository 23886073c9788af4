"""What the full dotted name of a layer says about it, in a model or in a checkpoint."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

# The rows of towers are not token rows. Nor are those of the layers that project their output.
_TOWER = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|image\w*|video\w*|speech\w*|sound\w*|whisper\w*|vpm|apm|"
    r"sam_model|qwen2_model|qformer|vit\w*|\w*_tower|\w*projectors?|\w*projection_layer|linear_proj|"
    r"language_projection|mlp_AR|\w*connector|\w*merger|aligner|mlp1|resampler|embed_vision|"
    r"embed_audio|embed_tokens_extend)(\.|$)"
)
# Drafters run after the pass that the plan was made for.
_DRAFTER = re.compile(r"(^|\.)(mtp\w*|eagle\w*|medusa\w*|drafter|nextn\w*)(\.|$)")
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
# Modules that may contain a decoder. The layers of an encoder have the same numbers, but are others.
_AROUND_A_DECODER = frozenset(
    (
        "model",
        "language_model",
        "text_model",
        "llm",
        "backbone",
        "thinker",
        "decoder",
        "transformer",
    )
)

# Projections that write the KV cache or the recurrent state, which prefill leaves to decode, so that
# precision pays here: attention's keys and values, latent attention's (MLA), and the inputs of gated
# delta nets.
STATE_WRITERS = (
    "k_proj",
    "v_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "in_proj_qkv",
    "in_proj_qkvz",
    "in_proj_ba",
    "in_proj_a",
    "in_proj_b",
)

# Layers that some checkpoints or engines fuse out of several projections, stacked along the output.
FUSED_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Fused layers whose projections may be interleaved: BLOOM's, GPT-NeoX', InternLM2's, ...
INTERLEAVED = ("query_key_value", "Wqkv", "wqkv", "W_pack", "c_attn")
FUSED_PROJECTIONS |= dict.fromkeys(INTERLEAVED, FUSED_PROJECTIONS["qkv_proj"])

# A router chooses an expert, and a wrong choice is not a small error. The layers are tiny, too.
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")


def is_tower(name: str) -> bool:
    """Whether a layer is part of a tower, or projects a tower's output: its rows are not tokens."""
    return _TOWER.search(name) is not None


def is_drafter(name: str, layers: int | None = None) -> bool:
    """Whether a layer is part of a drafter.

    Args:
        layers: the number of layers of the model itself. Drafters of multi-token prediction are
            numbered from there on.
    """
    number = layer_number(name)
    beyond = layers is not None and number is not None and number >= layers
    return beyond or _DRAFTER.search(name) is not None


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that contains this one, or None."""
    found = _DECODER_LAYER.search(name)
    return int(found[1]) if found else None


def from_layers(name: str) -> str:
    """The name of a decoder's layer from ``layers.`` on; any other name unchanged.

    Engines and checkpoints may disagree on the modules around a decoder.
    """
    found = _DECODER_LAYER.search(name)
    if found is None:
        return name
    around = name[: found.start()].split(".") if found.start() else []
    if not _AROUND_A_DECODER.issuperset(around):
        return name
    return name[found.start() :].removeprefix(".")


def is_router(layer: str) -> bool:
    """Whether the layer of this full dotted name chooses experts; it stays precise."""
    return _ROUTER.search(layer) is not None


def matches(pattern: str, layer: str) -> bool:
    """Whether a recipe's name or glob pattern is that of a layer, or of its last component."""
    return fnmatchcase(layer, pattern) or fnmatchcase(layer.rpartition(".")[2], pattern)
