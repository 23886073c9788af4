"""What vLLM calls in each of its processes: makes the method `mixquant` known to it."""

from __future__ import annotations


def register() -> None:
    """Registers the method and the hook that reads the recipe. Calling it again changes nothing."""
    import vllm
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization import register_quantization_config

    from mixquant.engines.vllm import versions
    from mixquant.engines.vllm.config import QUANTIZATION_METHOD, PhaseQuantizationConfig
    from mixquant.engines.vllm.patches import configuration

    versions.warn_if_unknown(vllm.__version__)
    register_quantization_config(QUANTIZATION_METHOD)(PhaseQuantizationConfig)
    configuration.install(VllmConfig)
