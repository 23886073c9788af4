"""How far a model's distributions are from a reference's."""

from __future__ import annotations

from torch import Tensor


def divergence(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How far distributions are from a reference, position by position.

    Args:
        reference: logits ``[positions, V]``.
        other: logits ``[positions, V]``.

    Returns:
        KL(reference, other) in nats ``[positions]`` FP64, and whether the likeliest token is the
        same ``[positions]``.
    """
    log_p = reference.double().log_softmax(dim=-1)
    log_q = other.double().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl, reference.argmax(dim=-1) == other.argmax(dim=-1)
