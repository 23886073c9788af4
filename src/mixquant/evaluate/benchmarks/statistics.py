"""Intervals of benchmark scores, and of differences between arms that answered the same items.

The sampling unit is the item. A benchmark's items are a sample of the items that it could have. The
seeds of one item say more about that item, not about others. To treat all answers as independent
would make intervals too narrow, by up to the square root of the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def item_weights(groups: Sequence[str], weights: Mapping[str, float]) -> Scores:
    """What each item counts, ``[items]``, in proportion.

    Args:
        groups: of each item.
        weights: how much each group counts, whatever its number of items; groups that have no item
            are left out. Empty: every item counts alike.
    """
    if not weights:
        return np.ones(len(groups))
    sizes = {group: groups.count(group) for group in set(groups)}
    return np.array([weights[group] / sizes[group] for group in groups])


def score(scores: Scores, weights: Scores | None = None) -> Estimate:
    """The mean score of an arm.

    The interval is Wilson's, with the effective number of answers in place of their number: as many
    independent ones as would give the mean the variance that the items' means show (Korn and
    Graubard 1998, with their correction by Student's t; Franco et al., J. Survey Stat. Methodol. 7,
    2019, compare it with others). At 0 % and 100 % no variance shows, and only the items count, so
    it never shrinks to a point, as a bootstrap does there.

    Args:
        scores: ``[items, seeds]``, each 0 to 1; NaN where there is none.
        weights: ``[items]``; None: alike.

    Raises:
        ValueError: no score at all.
    """
    means, counts, weights = _by_item(scores, weights)
    value = float(weights @ means / weights.sum())
    value = min(max(value, float(means.min())), float(means.max()))  # despite rounding
    weights = weights / weights.sum()
    items = 1 / float(weights @ weights)  # Kish's effective number; with equal weights, the number
    spread = value * (1 - value)
    effective = items
    if spread > 0 and len(means) > 1:
        correction = len(means) / (len(means) - 1)
        variance = correction * float(weights**2 @ (means - value) ** 2)
        most = items * float(weights @ counts)  # if all answers were independent
        effective = min(spread / variance, most) if variance > 0 else most
        # A variance that is estimated from few items is uncertain.
        freedom = max(items - 1, 1)
        effective *= (_normal_quantile() / float(stats.t.ppf(_upper(), freedom))) ** 2
    low, high = _wilson(value, effective)
    return Estimate(value, low, high)


def difference(scores: Scores, versus: Scores, weights: Scores | None = None) -> Estimate:
    """The mean score of an arm minus another's, over the (item, seed) that both have.

    The interval is a percentile bootstrap over items, each with all its seeds. To the items' differences
    it adds one of the largest size seen and one of its opposite (1 and -1 where none differ), as
    Bonett and Price (2012) do for paired proportions: otherwise arms that agree on few items would
    seem to agree on all that there could be.

    ``difference(a, b)`` is the negative of ``difference(b, a)``, interval and all.

    Args:
        scores, versus: ``[items, seeds]``, each 0 to 1; NaN where there is none.
        weights: ``[items]``; None: alike.

    Raises:
        ValueError: nothing that both have.
    """
    means, _, weights = _by_item(scores - versus, weights)
    value = float(weights @ means / weights.sum())
    parts = means * weights * (len(means) / weights.sum())
    changed = parts[np.flatnonzero(parts)]
    # Signed by the first that differs, so that exchanging the arms negates every resample.
    added = math.copysign(np.abs(changed).max(), changed[0]) if changed.size else 1.0
    sample = np.concatenate([parts, [added, -added]])
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(sample)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not changed.size:
        high = max(-low, high)
        low = -high
    return Estimate(value, max(min(low, value), -1.0), min(max(high, value), 1.0))


def recovery(bf16: float, quantized: float, arm: float) -> float | None:
    """The share of the loss from ``bf16`` to ``quantized`` that ``arm`` wins back.

    Not bounded: above 1 it is better than ``bf16``, below 0 worse than ``quantized``. None where
    quantizing everything lost nothing.
    """
    loss = bf16 - quantized
    return (arm - quantized) / loss if loss > 0 else None


def _by_item(scores: Scores, weights: Scores | None) -> tuple[Scores, NDArray[Any], Scores]:
    """Of the items that have any score: their means, numbers of scores, and weights."""
    counts = np.count_nonzero(~np.isnan(scores), axis=1)
    there = counts > 0
    if not there.any():
        raise ValueError("there is no score to take the mean of")
    means = np.nansum(scores[there], axis=1) / counts[there]
    kept = np.ones(len(means)) if weights is None else weights[there]
    return means, counts[there], kept


def _wilson(share: float, number: float) -> tuple[float, float]:
    z2 = _normal_quantile() ** 2
    middle = share + z2 / (2 * number)
    half = math.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2)))
    scale = 1 + z2 / number
    # Rounding must not push a bound past the share itself.
    low = min(max((middle - half) / scale, 0.0), share)
    return low, max(min((middle + half) / scale, 1.0), share)


def _upper() -> float:
    return (1 + CONFIDENCE) / 2


def _normal_quantile() -> float:
    return float(stats.norm.ppf(_upper()))
