"""A recipe's ``prefill_model``, asked for the layers of an engine's model.

A layer's copy has the more precise of two formats: the recipe's and the checkpoint's. It is taken from
the checkpoint where the checkpoint has that format, and is made from the BF16 weight elsewhere. A layer
that the checkpoint does not quantize stays BF16.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.prefill import PrefillCheckpoint
from mixquant.checkpoints.quantized_tensors import FormatName as StoredFormat
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.core.layer_names import from_layers, is_drafter, is_tower
from mixquant.core.recipe import FormatName, Recipe, RecipeError, most_precise


class SecondCheckpoint:
    """A quantized checkpoint, asked by an engine's names of layers.

    Its towers and drafters are left out, whose layers are numbered as the decoder's are.

    Raises:
        CheckpointError: two of its layers may be meant by one name.
    """

    def __init__(self, checkpoint: PrefillCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._names: dict[str, str] = {}
        for name in checkpoint.formats:
            if is_tower(name) or is_drafter(name, checkpoint.layers):
                continue
            other = self._names.setdefault(from_layers(name), name)
            if other != name:
                raise CheckpointError(
                    f"{checkpoint.source} holds two layers that may be {from_layers(name)}: {other} "
                    f"and {name}; a checkpoint with one decoder is needed"
                )

    def format_of(self, layer: str) -> StoredFormat | None:
        """The format of a layer, or None if it is not quantized there."""
        name = self._names.get(from_layers(layer))
        return self.checkpoint.formats[name] if name is not None else None

    def chosen(self, layer: str, wanted: FormatName) -> FormatName:
        """The format of a layer's copy: the more precise of the recipe's and the checkpoint's."""
        return most_precise((wanted, self.format_of(layer) or "bf16"))

    def layer(self, layer: str) -> Fp8Tensors | Nvfp4Tensors:
        """A layer's quantized weight, whole, on the CPU."""
        return self.checkpoint.layer(self._names[from_layers(layer)])

    def have_one_scale(self, first: str, second: str) -> bool:
        """Whether two layers may be held as one: NVFP4 has one scale for the whole tensor."""
        one, other = self.layer(first), self.layer(second)
        if isinstance(one, Nvfp4Tensors) and isinstance(other, Nvfp4Tensors):
            return torch.equal(one.global_scale, other.global_scale)
        return isinstance(one, Fp8Tensors) and isinstance(other, Fp8Tensors)

    def format_of_experts(self, experts: str, count: int) -> tuple[StoredFormat | None, str | None]:
        """The format of a layer of gated experts, or None and why they cannot be had from here.

        Args:
            experts: the layer's name, which those of its experts begin with.
            count: how many there are.
        """
        formats = [self.format_of(name) for name in self.expert_projections(experts, count)]
        if not any(formats):
            return None, "not quantized in the prefill model"
        if len(set(formats)) > 1:
            return None, "the prefill model has not all of them in one format"
        return formats[0], None

    def expert_projections(self, experts: str, count: int) -> list[str]:
        """The names of gate, up and down of each expert; arguments as of `format_of_experts`."""
        first = next(
            (of for of in _EXPERT if self.format_of(f"{experts}.0.{of[0]}") is not None), _EXPERT[0]
        )
        return [f"{experts}.{number}.{of}" for number in range(count) for of in first]


# Gate, up and down of an expert, as checkpoints call them.
_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@functools.lru_cache(maxsize=1)
def opened(source: str) -> SecondCheckpoint:
    """The checkpoint, opened once in this process. Raises CheckpointError."""
    return SecondCheckpoint(PrefillCheckpoint.open(source))


def check_fits(prefill_model: str, config: Mapping[str, Any], model: str) -> None:
    """Checks that a checkpoint is of a model.

    Norms and embeddings are compared if the model's safetensors files are at hand; quantized layers are
    compared with the loaded weights when their copies are made.

    Args:
        config: the model's.
        model: the directory that it was loaded from, or another name.

    Raises:
        CheckpointError: it is of another model, or cannot be read.
    """
    at_hand = model and any(Path(model).glob("*.safetensors"))
    opened(prefill_model).checkpoint.check_against(config, model if at_hand else None)


def with_format_of(recipe: Recipe) -> Recipe:
    """A recipe with a mapping of formats for its prefill_model: its own, or the checkpoint's format.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        RecipeError: no layer's copy would come from it.
    """
    assert recipe.prefill_model is not None
    there = set(opened(recipe.prefill_model).checkpoint.formats.values())
    name: FormatName = "nvfp4" if "nvfp4" in there else "fp8"
    if recipe.preset == "exact" or (
        isinstance(recipe.format, str) and recipe.format not in ("auto", name)
    ):
        raise RecipeError(
            f"the recipe's formats come from {recipe.prefill_model}, in {name}; remove 'format' from "
            "the recipe or give a mapping from projections to formats, with a preset other than exact"
        )
    return replace(recipe, format={"default": name}) if isinstance(recipe.format, str) else recipe
