"""vLLM's configuration: it reads mixquant's recipe and checks it as soon as it is made."""

from __future__ import annotations

import functools
from typing import Any

from mixquant.engines.vllm import settings
from mixquant.engines.vllm.config import QUANTIZATION_METHOD, PhaseQuantizationConfig
from mixquant.engines.vllm.log import refusals
from mixquant.engines.vllm.patches import beams


def install(config_class: Any) -> None:
    """Makes vLLM's configuration read the recipe and check it as soon as it is made.

    Args:
        config_class: vLLM's VllmConfig. It has no hook that sees the whole configuration, so its
            ``__post_init__`` is wrapped.
    """
    original = config_class.__post_init__
    if getattr(original, "mixquant", False):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.model_config is None or self.model_config.quantization != QUANTIZATION_METHOD:
            original(self, *args, **kwargs)
            return
        with refusals():
            settings.check(self)
        compilation = self.compilation_config
        default_sizes = (
            compilation.cudagraph_capture_sizes is None
            and compilation.max_cudagraph_capture_size is None
        )
        original(self, *args, **kwargs)
        with refusals():
            settings.settle(self)
        if isinstance(self.quant_config, PhaseQuantizationConfig):
            # A copy of a configuration has the sizes that were chosen before.
            self.quant_config.default_graph_sizes |= default_sizes
            beams.install()

    post_init.mixquant = True  # type: ignore[attr-defined]
    config_class.__post_init__ = post_init
