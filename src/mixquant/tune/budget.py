"""What a recipe may cost in fidelity or in bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Budget:
    """A limit.

    ``kl``: nats per token from BF16 at most. ``recovered``: of what quantizing both phases in the
    fastest format loses, the share won back at least. ``bits``: mean bits of a multiplied weight at
    most.
    """

    kind: Literal["kl", "recovered", "bits"]
    value: float

    def limit(self, quantized: float) -> float | None:
        """The largest divergence allowed, on texts where quantizing both phases has this one."""
        if self.kind == "kl":
            return self.value
        return (1 - self.value) * quantized if self.kind == "recovered" else None
