"""What this machine can do for the plugin: the only module that asks which formats and kernels it has.

Others ask torch only whether there is a CUDA device, to allocate on it or to capture graphs.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from packaging.version import Version

from mixquant import formats
from mixquant.hardware import HOPPER, cuda_capability, cuda_formats


def native_in_vllm() -> tuple[frozenset[str], str]:
    """What this machine multiplies natively in vLLM, without starting CUDA, and the machine's name."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM's oneDNN has what torch's has: without VNNI its INT8 sums saturate.
        return formats.native_formats(torch.device("cpu")), "this CPU"
    if not current_platform.is_cuda():
        return frozenset(), f"vLLM's platform {current_platform.device_name}"
    capability = current_platform.get_device_capability()
    level = capability.to_int() if capability is not None else 0
    return cuda_formats(divmod(level, 10)), current_platform.get_device_name()


def why_unsupported() -> str | None:
    """Why the plugin cannot serve on vLLM's platform here, or None if it can."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() or current_platform.is_cpu():
        return None
    return f"mixquant serves on NVIDIA GPUs and CPUs, not on {current_platform.device_name}"


def is_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def emulates(fmt: str) -> bool:
    """Whether products in this format are emulated on this machine."""
    return fmt not in native_in_vllm()[0]


def multiplies_by_cutlass(fmt: str) -> bool:
    """Whether vLLM's CUTLASS kernels multiply this format here."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and fmt in ("fp8", "int8") and not emulates(fmt)


@functools.cache
def is_hopper() -> bool:
    """Whether the GPU of this process has compute capability 9.0."""
    return torch.cuda.is_available() and cuda_capability(torch.device("cuda")) == HOPPER


def why_no_triton() -> str | None:
    """Why kernels in Triton cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return None if importlib.util.find_spec("triton") is not None else "needs Triton"


def why_no_fp8_layers() -> str | None:
    """Why no linear layer is an `Fp8Layer` here, or None if layers can be."""
    if not is_hopper():
        return "needs a GPU of compute capability 9.0"
    return why_no_triton()


def why_no_fp8_attention() -> str | None:
    """Why no layer attends in FP8 here, or None if layers can."""
    if not is_hopper():
        return "needs a GPU of compute capability 9.0"
    if importlib.util.find_spec("fa3_fwd") is None:
        return "needs the package fa3-fwd"
    return None


@functools.cache
def triton_has_block_scales() -> bool:
    """Whether this Triton multiplies NVFP4 with E4M3 block scales: from 3.9."""
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= Version("3.9")


def has_nvfp4_experts() -> bool:
    """Whether vLLM has CUTLASS's grouped products in NVFP4 for this GPU."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_utils import cutlass_fp4_supported

    return cutlass_fp4_supported() and not emulates("nvfp4")
