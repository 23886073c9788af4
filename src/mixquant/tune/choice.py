"""One point of the search: a format for each projection, and what holds for the whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from mixquant.core.recipe import FormatName, Recipe
from mixquant.tune.units import Units

BlockScale = Literal["6", "4/6"]


@dataclass(frozen=True)
class Choice:
    """What the search decides. ``formats`` has one entry for each unit, in their order."""

    formats: tuple[FormatName, ...]
    block_scale: BlockScale
    precise_head: int
    precise_tail: int

    def recipe(self, units: Units, default: FormatName) -> Recipe:
        """The recipe that says so, and nothing that depends on the machine.

        A projection's most frequent format is said once, other layers' by their names. Those come
        first, since the first pattern that matches decides.

        Args:
            default: the format of layers that are not among the units.
        """
        of: dict[str, list[FormatName]] = {}
        for unit, fmt in zip(units.chosen, self.formats, strict=True):
            of.setdefault(unit.projection, []).append(fmt)
        usual = {name: Counter(found).most_common(1)[0][0] for name, found in of.items()}
        by_layer = {
            unit.pattern: fmt
            for unit, fmt in zip(units.chosen, self.formats, strict=True)
            if fmt != usual[unit.projection]
        }
        by_projection = {name: fmt for name, fmt in usual.items() if fmt != default}
        return Recipe(
            format={**by_layer, **by_projection, "default": default},
            # Measured so: each pass of a prompt is quantized, and attends in BF16.
            min_prefill_tokens=None,
            precise_head=self.precise_head,
            precise_tail=self.precise_tail,
            block_scale=self.block_scale if "nvfp4" in {*self.formats, default} else "6",
            prefill_attention="bf16",
        )
