"""Loading: what a prefill engine does a layer at a time, and weights that are loaded anew.

In a prefill engine BF16 weights are never all there. vLLM has this for its own quantization of BF16
checkpoints: a layer's parameters begin on the meta device, and when the last of its tensors has been
read they are made, filled and processed at once.
"""

from __future__ import annotations

from typing import Any

import torch

from mixquant.errors import MixquantError

# Set on a layer that was processed; vLLM takes it away before it processes one again.
_DONE = "_already_called_process_weights_after_loading"


class CannotReload(MixquantError, RuntimeError):
    """Weights that a running engine cannot load. The message is one line."""


def load_in_turn(method: Any, layer: torch.nn.Module) -> None:
    """Makes vLLM fill and process a layer, whose weights are on the meta device, on its own."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    method.uses_meta_device = True  # read by vLLM's loaders
    initialize_online_processing(layer)


def should_process(layer: Any, *, loaded_before: bool) -> bool:
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


def is_loading(layer: torch.nn.Module) -> bool:
    """Whether vLLM is loading a layer anew and will process it when it has all of it."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    info = LAYERWISE_INFO.get(layer)
    return info is not None and info.can_load()


def kept_weight(layer: Any) -> Any:
    """The weight that a layer will have: loaded anew, its values are copied into the old tensor."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    info = LAYERWISE_INFO.get(layer)
    parameters = info.kernel_tensors[0] if info is not None and info.kernel_tensors else {}
    return parameters.get("weight", layer.weight)


def replays_graphs() -> bool:
    """Whether this engine replays CUDA graphs. Asked while vLLM makes layers: later nothing says so."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    eager = (
        config is not None and config.model_config is not None and config.model_config.enforce_eager
    )
    return torch.cuda.is_available() and not eager


def weights_are_made_up() -> bool:
    """Whether this engine invents its weights (``--load-format dummy``). Asked as `replays_graphs`."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and getattr(config.load_config, "load_format", None) == "dummy"
