"""Whether the quantized copy fits, found out while the model is laid out, before weights are read."""

from __future__ import annotations

import torch

from mixquant.core.layer_names import layer_number
from mixquant.errors import MixquantError

_GIB = 2**30


class CopyDoesNotFit(MixquantError, RuntimeError):
    """Too little memory for the quantized copy. The message is one line: how much, and what fits."""


class Ledger:
    """The copies that the layers made so far will need, and the check that they can have them."""

    def __init__(self) -> None:
        self._copies: dict[str, int] = {}  # by layer name: a model loaded anew counts once
        self._weights: dict[str, int] = {}
        self._before = 0  # bytes that this process had allocated before, other engines' above all

    def reserve(
        self, device: torch.device, prefix: str, nbytes: int, weight_nbytes: int, advice: str
    ) -> None:
        """Counts one layer's copy.

        Args:
            device: where it will be.
            prefix: the layer's full name.
            nbytes: of the copy.
            weight_nbytes: of the BF16 weight, which is allocated already on a GPU; 0 if it does not
                stay.
            advice: what to do if there is too little memory.

        Raises:
            CopyDoesNotFit: the copies so far do not fit beside the BF16 weights.
        """
        if not self._copies:
            self._before = _allocated(device) - weight_nbytes
        self._copies[prefix] = nbytes
        self._weights[prefix] = weight_nbytes
        needed = sum(self._copies.values())
        free = _free(device, self._before)
        if device.type == "cpu":  # where empty tensors take no memory yet
            needed += sum(self._weights.values())
        if needed <= free:
            return
        missing = self._estimate(device) - free
        next_to_bf16 = " beside the BF16 ones" if any(self._weights.values()) else ""
        raise CopyDoesNotFit(
            f"the quantized copy of the weights does not fit{next_to_bf16}: about "
            f"{missing / _GIB:.1f} GiB are missing on {device}; {advice}"
        )

    def _estimate(self, device: torch.device) -> float:
        """The bytes that all layers will need, beyond what is allocated, as those so far did."""
        copies, weights = sum(self._copies.values()), sum(self._weights.values())
        seen = {layer_number(name) for name in self._copies} - {None}
        share = len(seen) / _layer_count() if seen else 1.0
        later = weights / share - (0 if device.type == "cpu" else weights)
        return copies / share + later


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device, before: int) -> float:
    """Bytes that this engine may still take on a device; ``before`` it, so many were taken."""
    if device.type != "cuda":
        import psutil

        return float(psutil.virtual_memory().available)
    from vllm.config import get_current_vllm_config

    free, total = torch.cuda.mem_get_info(device)
    # vLLM's share of the GPU is this engine's own, whatever others take of the rest.
    share: float = get_current_vllm_config().cache_config.gpu_memory_utilization
    return min(float(free), share * total - (_allocated(device) - before))


def _layer_count() -> int:
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    count: int = config.model_config.get_num_layers(config.parallel_config)
    return max(1, count)
