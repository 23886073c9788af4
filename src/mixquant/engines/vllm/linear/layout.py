"""Which output features of a linear layer in vLLM are in which format, and why some stay BF16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.layer_names import FUSED_PROJECTIONS, INTERLEAVED
from mixquant.core.phase import Range
from mixquant.core.recipe import FormatName, Recipe, most_precise
from mixquant.core.summary import IGNORED, THE_RECIPE
from mixquant.engines.vllm.products.base import unsupported_shape


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive output features of a layer that share a format.

    ``projections`` are those that it consists of, by the last component of their names, with the
    number of output features of each; for a layer that is not fused, its own.
    """

    features: Range
    format: str
    projections: tuple[tuple[str, int], ...]
    why_precise: str | None = None  # for bf16

    @property
    def label(self) -> str:
        return "+".join(name for name, _ in self.projections)


def lay_out(
    recipe: Recipe,
    prefix: str,
    sizes: Sequence[int],
    in_features: int,
    members: Sequence[str] | None = None,
) -> tuple[OutputSlice, ...]:
    """The parts of a layer, in order; parts of one format that touch are one.

    Args:
        recipe: resolved.
        prefix: the layer's full name.
        sizes: output features of the matrices that vLLM has stacked in it, on this rank.
        in_features: on this rank.
        members: the projections that the model says it is fused from, if it says so.

    Raises:
        CheckpointError: the recipe's prefill_model cannot be read.
    """
    last = prefix.rpartition(".")[2]
    total = sum(sizes)

    def whole(fmt: str, why: str | None = None) -> tuple[OutputSlice, ...]:
        return (_possible(OutputSlice((0, total), fmt, ((last, total),), why), in_features),)

    if recipe.ignores(prefix):
        return whole("bf16", IGNORED)
    if last == "conv1d":
        return whole("bf16", "a convolution")
    if last == "kv_b_proj":
        # Latent attention reads keys back from the cache through it, rows of no pass.
        return whole("bf16", "its rows are not the pass's")

    if recipe.prefill_model is not None and last in INTERLEAVED:
        return whole("bf16", "vLLM may have its rows in another order than the prefill model")

    names = tuple(members or FUSED_PROJECTIONS.get(last) or ())
    formats = _formats(recipe, prefix, names)
    if formats is None:
        return whole(_format(recipe, prefix))
    if len(formats) != len(sizes):
        # Where the projections lie is not known: the whole as precise as its most precise one.
        if recipe.prefill_model is None:
            return whole(most_precise(formats))
        return whole("bf16", "vLLM has it in other parts than the prefill model")

    parts: list[OutputSlice] = []
    start = 0
    for name, fmt, size in zip(names, formats, sizes, strict=True):
        part = OutputSlice((start, start + size), fmt, ((name, size),))
        start += size
        if parts and parts[-1].format == fmt and _may_join(recipe, prefix, parts[-1], name):
            before = parts.pop()
            part = replace(
                part,
                features=(before.features[0], start),
                projections=before.projections + part.projections,
            )
        parts.append(part)
    return tuple(_possible(part, in_features) for part in parts)


def sibling(prefix: str, projection: str) -> str:
    """The full name of a projection that the layer of this name is fused from."""
    path = prefix.rpartition(".")[0]
    return f"{path}.{projection}" if path else projection


def from_checkpoint(recipe: Recipe, layer: str, fmt: str) -> bool:
    """Whether a projection's copy in this format is the prefill model's."""
    return recipe.prefill_model is not None and opened(recipe.prefill_model).format_of(layer) == fmt


def _formats(recipe: Recipe, prefix: str, names: Sequence[str]) -> tuple[FormatName, ...] | None:
    """The formats of the projections that a layer is fused from, or None if it counts as one."""
    if not names:
        return None
    formats = recipe.formats_of_fused(prefix, names)
    if recipe.prefill_model is None:
        return formats
    source = opened(recipe.prefill_model)
    layers = [sibling(prefix, name) for name in names]
    if not any(map(source.format_of, layers)) and source.format_of(prefix) is not None:
        return None  # fused in the checkpoint, too
    wanted = formats or (recipe.format_of(prefix),) * len(names)
    return tuple(map(source.chosen, layers, wanted))


def _format(recipe: Recipe, prefix: str) -> FormatName:
    if recipe.prefill_model is None:
        return recipe.format_of(prefix)
    wanted = recipe.formats_of_fused(prefix) or (recipe.format_of(prefix),)
    return opened(recipe.prefill_model).chosen(prefix, most_precise(wanted))


def _may_join(recipe: Recipe, prefix: str, before: OutputSlice, name: str) -> bool:
    """Whether a projection may be held in one tensor with those before it, in the same format."""
    if recipe.prefill_model is None or before.format == "bf16":
        return True
    pair = [sibling(prefix, one) for one in (before.projections[-1][0], name)]
    stored = {from_checkpoint(recipe, layer, before.format) for layer in pair}
    if len(stored) > 1:
        return False
    return stored == {False} or opened(recipe.prefill_model).have_one_scale(*pair)


def _possible(part: OutputSlice, in_features: int) -> OutputSlice:
    """The part, in BF16 if the kernel of its format cannot hold it."""
    if part.format == "bf16":
        return replace(part, why_precise=part.why_precise or THE_RECIPE)
    out_features = part.features[1] - part.features[0]
    reason = unsupported_shape(part.format, out_features, in_features)
    if reason is None:
        return part
    return replace(part, format="bf16", why_precise=f"{part.format} cannot hold it: {reason}")
