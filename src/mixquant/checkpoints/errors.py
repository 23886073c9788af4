"""The errors of models and checkpoints."""

from __future__ import annotations

from mixquant.errors import MixquantError


class ModelError(MixquantError, ValueError):
    """A model that cannot be loaded. The message is one line and says what to do."""


class CheckpointError(ModelError):
    """A checkpoint that cannot give the prefill copy. The message is one line."""
