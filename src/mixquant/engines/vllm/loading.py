"""Loading for a prefill engine: one layer at a time, so that BF16 weights are never all there.

vLLM has this for its own quantization of BF16 checkpoints: a layer's parameters begin on the meta
device, and when the last of its tensors has been read they are made, filled and processed at once.
"""

from __future__ import annotations

from typing import Any

import torch

# Set on a layer that was processed; vLLM takes it away before it processes one again.
_DONE = "_already_called_process_weights_after_loading"


class CannotReload(RuntimeError):
    """Weights that are loaded into a running prefill engine. The message is one line."""


def load_in_turn(method: Any, layer: torch.nn.Module) -> None:
    """Makes vLLM fill and process a layer, whose weights are on the meta device, on its own."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    method.uses_meta_device = True  # read by vLLM's loaders
    initialize_online_processing(layer)


def begins(layer: Any, *, loaded_before: bool) -> bool:
    """Whether a layer is to be processed now: False if it was already, as it was loaded.

    Raises:
        CannotReload: ``loaded_before``, and here are its weights again: captured CUDA graphs read
            the copy that is there.
        RuntimeError: a loader that does not fill layers in turn.
    """
    if getattr(layer, _DONE, False):
        return False
    if loaded_before:
        raise CannotReload("a prefill engine cannot load weights again: restart it")
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise RuntimeError(
            "role 'prefill' loads a layer at a time, which this --load-format does not do; use auto, "
            "safetensors or dummy"
        )
    setattr(layer, _DONE, True)
    return True
