"""A world of one process, which vLLM's layers ask for their rank when they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel


@contextmanager
def one_rank(folder: Path) -> Iterator[VllmConfig]:
    """Inside, layers of vLLM can be made; ``folder`` is for its store."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()
