"""What the full dotted name of a layer says of it, in a model or in a checkpoint."""

from __future__ import annotations

import re

# Towers have rows of their own, none of them a token row; so has what projects their output.
_TOWER = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|image\w*|video\w*|speech\w*|sound\w*|whisper\w*|vpm|apm|"
    r"sam_model|qwen2_model|qformer|vit\w*|\w*_tower|\w*projectors?|\w*projection_layer|linear_proj|"
    r"language_projection|mlp_AR|\w*connector|\w*merger|aligner|mlp1|resampler|embed_vision|"
    r"embed_audio|embed_tokens_extend)(\.|$)"
)
# Drafters run after the pass whose plan it was.
_DRAFTER = re.compile(r"(^|\.)(mtp\w*|eagle\w*|medusa\w*|drafter|nextn\w*)(\.|$)")
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
# What a decoder may lie in. An encoder's layers are numbered alike, and are others.
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


def is_tower(name: str) -> bool:
    """Whether it is of a tower, or projects a tower's output: its rows are not tokens."""
    return _TOWER.search(name) is not None


def is_drafter(name: str, layers: int | None = None) -> bool:
    """Whether it is of a drafter.

    Args:
        layers: how many the model itself has. Drafters of multi-token prediction are numbered on
            from its last one.
    """
    number = layer_number(name)
    beyond = layers is not None and number is not None and number >= layers
    return beyond or _DRAFTER.search(name) is not None


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that it is in, or None."""
    found = _DECODER_LAYER.search(name)
    return int(found[1]) if found else None


def from_layers(name: str) -> str:
    """The name of a decoder's layer from ``layers.`` on, any other name as it is.

    Engines and checkpoints may disagree on what a decoder lies in.
    """
    found = _DECODER_LAYER.search(name)
    if found is None:
        return name
    around = name[: found.start()].split(".") if found.start() else []
    if not _AROUND_A_DECODER.issuperset(around):
        return name
    return name[found.start() :].removeprefix(".")
