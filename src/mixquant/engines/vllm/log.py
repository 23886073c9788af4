"""The plugin's lines in vLLM's log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.logger import init_logger

from mixquant.engines.vllm.versions import UnsupportedVersion

# vLLM configures its own loggers only, so this one takes a name below them.
logger = init_logger("vllm.mixquant")


@contextmanager
def refusals() -> Iterator[None]:
    """Says in one line what vLLM will show at the end of a traceback, or within other errors."""
    try:
        yield
    except (ValueError, UnsupportedVersion) as error:
        logger.error("mixquant cannot serve this: %s", error)
        raise
