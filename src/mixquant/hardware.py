"""What NVIDIA GPUs multiply natively, by compute capability. Both engines ask here."""

from __future__ import annotations

import torch

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
BLACKWELL = (10, 12)  # major versions: data center, and workstation or gaming


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) for any other device.

    ROCm calls its devices ``cuda``, too, and their architectures capabilities: MI300 is "9.4", and its
    FP8 is another.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def cuda_formats(capability: tuple[int, int]) -> frozenset[str]:
    """The names of the formats that a GPU of this compute capability multiplies natively.

    INT8 ends with Hopper: Blackwell has few INT8 units, and no kernel for them in vLLM.
    """
    major, _ = capability
    found = set()
    if AMPERE <= capability < (10, 0):
        found.add("int8")
    if capability >= ADA:
        found.add("fp8")
    if major in BLACKWELL:
        found.add("nvfp4")
    return frozenset(found)
