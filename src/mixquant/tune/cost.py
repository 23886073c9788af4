"""The cost model: how long prefill's products take, and how many bits their weights have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixquant.evaluate.fidelity.cost import BITS
from mixquant.tune.choice import Choice
from mixquant.tune.targets import Target
from mixquant.tune.units import Units


@dataclass(frozen=True)
class CostModel:
    """Time of the products of a prompt's linear layers.

    Attention takes the same time in every recipe and is left out, so ratios of whole prefills are nearer
    to 1.

    A quantized row multiplies each projection at the rate of its format, a precise row at BF16's.
    The output head, which reads one row of a prompt, does not count.

    Attributes:
        units: of the model.
        target: whose rates count.
        tokens: of the prompt.
    """

    units: Units
    target: Target
    tokens: int

    @cached_property
    def _work(self) -> np.ndarray:
        return np.array([unit.work for unit in self.units.chosen], dtype=np.float64)

    @cached_property
    def _plain(self) -> float:
        formats = [self.target.plain] * len(self.units)
        return self._time(formats, precise=1)

    def time(self, choice: Choice) -> float:
        """Of a prefill, relative to plain: every unit in the fastest format, the last token precise."""
        precise = min(choice.precise_head + choice.precise_tail, self.tokens)
        return self._time(choice.formats, precise) / self._plain

    def times(self, fmt: str, head: int, tail: int) -> np.ndarray:
        """``[units]``: what each unit adds to `time` in this format."""
        precise = min(head + tail, self.tokens)
        rows = (self.tokens - precise) / self.target.rates[fmt]
        return self._work * (rows + precise / self.target.rates["bf16"]) / self._plain

    def bits(self, choice: Choice) -> float:
        """Mean bits of a multiplied weight, as `mixquant fidelity` counts them."""
        found = np.array([BITS[fmt] for fmt in choice.formats])
        fixed = self.units.fixed
        return float((found @ self._work + BITS["bf16"] * fixed) / (self._work.sum() + fixed))

    def bits_of(self, fmt: str) -> np.ndarray:
        """``[units]``: what each unit adds to `bits` in this format."""
        return BITS[fmt] * self._work / (self._work.sum() + self.units.fixed)

    def _time(self, formats: object, precise: int) -> float:
        rates: Mapping[str, float] = self.target.rates
        slow = rates["bf16"]
        of = np.array([rates[fmt] for fmt in formats])  # type: ignore[attr-defined]
        rows = self.tokens - precise
        quantized = float((self._work / of).sum()) * rows
        return quantized + (precise * self._work.sum() + self.tokens * self.units.fixed) / slow
