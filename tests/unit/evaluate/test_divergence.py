"""The distance of distributions from a reference's, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mixquant.evaluate.divergence import divergence


def test_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    kl, agrees = divergence(p.log(), q.log())
    assert kl.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0], abs=1e-6)
    assert agrees.tolist() == [False, True]
