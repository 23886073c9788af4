"""What became of a patch of a loaded model: in how many places it took, and why not in the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How often a patch took.

    Attributes:
        what: was done, in words that a number can follow: "norms fused".
        reasons: one for each place, None where the patch took.
        why_no_place: why there is no place at all, where one would expect some.
    """

    what: str
    reasons: tuple[str | None, ...]
    why_no_place: str | None = None

    @classmethod
    def nowhere(cls, what: str, candidates: int, why: str) -> Outcome:
        """The patch took in none of the candidates, for one reason."""
        return cls(what, (why,) * candidates)

    @classmethod
    def no_place(cls, what: str, why: str) -> Outcome:
        """There was nothing to count, and the table should say why."""
        return cls(what, (), why)

    @property
    def taken(self) -> int:
        return self.reasons.count(None)

    def __str__(self) -> str:
        if self.why_no_place is not None:
            return f"{self.what} none ({self.why_no_place})"
        missed = Counter(why for why in self.reasons if why is not None)
        why = "; ".join(f"{count}: {why}" for why, count in sorted(missed.items()))
        line = f"{self.what} {self.taken} of {len(self.reasons)}"
        return f"{line} ({why})" if why else line


def lines_of(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """The lines for the table, of the patches that had a place to take, or say why they had none."""
    return tuple(str(one) for one in outcomes if one.reasons or one.why_no_place is not None)
