"""Weights that are loaded without vLLM's processing: their copies are made again, or refused."""

from __future__ import annotations

import functools
from typing import Any

from mixquant.engines.vllm.loading.online import CannotReload, is_loading


def patch_load_weights(model: Any) -> None:
    """Has the copies made again whose weights are written to where they are.

    vLLM's own reload processes each layer; a worker extension that calls ``model.load_weights`` (as for
    reinforcement learning) processes none.
    """
    load = getattr(model, "load_weights", None)
    if load is None:
        return

    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        methods = [(layer, getattr(layer, "quant_method", None)) for layer in model.modules()]
        ours = [(layer, method) for layer, method in methods if hasattr(method, "renew")]
        if not any(is_loading(layer) for layer, _ in ours):  # or vLLM will process them
            refusals = []
            for layer, method in ours:
                try:
                    method.renew(layer)  # type: ignore[union-attr]
                except CannotReload as refusal:  # the others' copies are not to stay old for it
                    refusals.append(refusal)
            if refusals:
                raise refusals[0]
        return loaded

    model.load_weights = load_weights


def refuse_kernel_format(is_checkpoint_format: bool) -> None:
    """Raises CannotReload for weights that vLLM would write over its own, layer by layer unprocessed."""
    if not is_checkpoint_format:
        raise CannotReload(
            "mixquant makes its copies of weights in the checkpoint's format; reload them with "
            "is_checkpoint_format=True"
        )
