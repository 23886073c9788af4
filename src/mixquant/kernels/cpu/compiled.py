"""Fusion by torch.compile, with plain PyTorch where there is no C++ compiler.

On a CPU a chain of elementwise operations costs one pass over memory each, and next to an INT8
product on VNNI or AMX that is most of the time. TorchInductor turns the chain into one loop.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Guards and dispatch cost some 20 us a call, as much as the plain chain on this many rows; and a
# row count of 1 would be compiled a second time, because dynamo specializes on 0 and 1.
PLAIN_ROWS = 16

_lock = threading.Lock()
_failure: str | None = None


def why_not_fused() -> str | None:
    """Why this process runs the plain chains, or None while fusion works (or was not tried yet)."""
    return _failure


def fused(
    *, few_rows: int = PLAIN_ROWS, options: dict[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a chain of tensor operations for any shape, on its first call with many rows.

    The first tensor argument is ``[rows, ...]``. Where compiling fails, for want of a C++ compiler
    above all, the chain runs as written, and a warning says so once.

    Args:
        few_rows: up to so many rows the chain runs as written. Only for chains that give the same
            bits either way: a row must not depend on how many others there are.
        options: of TorchInductor.
    """
    return functools.partial(_fused, few_rows=few_rows, options=options)


def _fused(
    chain: Callable[..., Any], few_rows: int, options: dict[str, Any] | None
) -> Callable[..., Any]:

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # Each chain meets a handful of types, layouts and gradient modes. dynamo's limit of eight
        # would send a process that meets them all back to the plain chain, for good.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        return torch.compile(chain, dynamic=True, options=options)

    @functools.wraps(chain)
    def run(x: torch.Tensor, *rest: Any) -> Any:
        # On a GPU the compiled chain would divide and multiply-add with other roundings.
        if not x.is_cpu or x.shape[0] <= few_rows or _failure is not None:
            return chain(x, *rest)
        # One thread at a time: two compiling the same chain would race in dynamo's caches.
        try:
            with _lock, torch.no_grad():
                return compiled()(x, *rest)
        except Exception as error:
            if not _is_compile_error(error):
                raise
            result = chain(x, *rest)  # what is wrong with the arguments is raised here again
            _give_up(error)
            return result

    return run


def _is_compile_error(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, CppCompileError, InvalidCxxCompiler))


def _give_up(error: Exception) -> None:
    global _failure
    _failure = str(error).strip().splitlines()[0]
    logger.warning(
        "mixquant: cannot compile its fused kernels (%s); activations are quantized by plain "
        "PyTorch instead, more slowly. Install a C++ compiler (Debian: g++) to mend this.",
        _failure,
    )
