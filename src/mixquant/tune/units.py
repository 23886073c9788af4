"""What a recipe can choose a format for: the projections of a model, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mixquant.core.phase import Range
from mixquant.core.recipe import FormatName, Recipe
from mixquant.engines.transformers.layout import layout_of, linears, projections

_NUMBER = re.compile(r"(?P<before>(^|.*\.)(?P<blocks>[^.]+)\.\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Unit:
    """One projection of one layer: the smallest thing that a recipe names.

    Attributes:
        name: the projection's full dotted name, also where it is fused into a layer with others.
        layer: the full dotted name of the linear layer that holds it.
        features: its output features in that layer.
        work: multiply-adds for each token.
    """

    name: str
    layer: str
    features: Range
    work: int

    @property
    def projection(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def pattern(self) -> str:
        """What names it in a recipe, with each engine: engines put other names before the layers."""
        found = _NUMBER.fullmatch(self.name)
        if found is None or found["before"].count(".") < 2:
            return self.name
        block = ".".join(found["before"].rsplit(".", 2)[1:])
        return f"*.{block}.{found['rest']}"


@dataclass(frozen=True)
class Units:
    """The projections of a model that can be quantized, in the order of the model.

    ``fixed`` are the multiply-adds for each token in linear layers that stay BF16 whatever a recipe
    says: routers, experts in Transformers, shapes that no format holds. The output head is not among
    them, since prefill multiplies one row of a prompt with it.
    """

    chosen: tuple[Unit, ...]
    fixed: int

    def __len__(self) -> int:
        return len(self.chosen)


def units_of(model: PreTrainedModel, formats: Sequence[FormatName]) -> Units:
    """The projections of a model that a device can hold in each of these formats."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    recipes = [Recipe(format={"default": name}).resolved(frozenset()) for name in formats]
    chosen: list[Unit] = []
    fixed = 0
    for name, linear in linears(model, decoder):
        if linear is head:
            continue
        if not all(_holds(name, linear, recipe, model) for recipe in recipes):
            fixed += linear.weight.numel()
            continue
        for projection, (start, stop) in projections(name, linear, model):
            work = (stop - start) * linear.weight.shape[1]
            chosen.append(Unit(projection, name, (start, stop), work))
    return Units(tuple(chosen), fixed)


def _holds(name: str, linear: nn.Linear, recipe: Recipe, model: PreTrainedModel) -> bool:
    layout, _ = layout_of(name, linear, recipe, model)
    return all(fmt != "bf16" for _, fmt, _ in layout)
