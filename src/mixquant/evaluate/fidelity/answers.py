"""The answers of an arm to passages: the data that engines give and that fidelity is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixquant.checkpoints.models import Checkpoint
from mixquant.core.recipe import Recipe
from mixquant.core.summary import Layer
from mixquant.errors import MixquantError
from mixquant.evaluate.fidelity.passages import Passages

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, float], None]


class EngineError(MixquantError, ValueError):
    """An engine that did not start, or ended early. The message is one line."""


@dataclass(frozen=True)
class Answers:
    """The answers of one arm to the passages of one prompt length.

    Attributes:
        logits: per text ``[answer tokens, V]``, in the type that the model computes them in, on the
            CPU: the prediction at each position of the continuation, given everything before it.
        greedy: per text, its own answer, the likeliest token each time; no token ends it early.
        quantized_share: of the prompt tokens that were computed, those with a quantized row.
    """

    logits: tuple[Tensor, ...]
    greedy: tuple[tuple[int, ...], ...]
    quantized_share: float


@dataclass(frozen=True)
class ArmAnswers:
    """All results of one arm."""

    answers: tuple[Answers, ...]  # in the order of the passages
    recipe: dict[str, Any] | None  # with everything decided; None without mixquant
    layers: tuple[Layer, ...]  # the summary's layers; empty without mixquant
    head: str | None  # the name of the output head, if it may be among them


Engine = Callable[[Checkpoint, Recipe | None, Sequence[Passages], Progress], ArmAnswers]
"""Runs one arm: the model with a recipe, or for None without mixquant."""
