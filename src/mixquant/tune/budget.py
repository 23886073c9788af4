"""What a recipe may cost in fidelity or in bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Budget:
    """A limit.

    ``kl``: the largest KL from BF16, in nats per token. ``recovered``: the smallest share won back of
    the loss of quantizing both phases in the fastest format. ``bits``: the largest mean bits of a
    multiplied weight.
    """

    kind: Literal["kl", "recovered", "bits"]
    value: float

    def limit(self, quantized: float) -> float | None:
        """The largest divergence allowed, on texts where quantizing both phases has this one."""
        if self.kind == "kl":
            return self.value
        return (1 - self.value) * quantized if self.kind == "recovered" else None
