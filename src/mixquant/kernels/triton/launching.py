# mypy: allow-untyped-defs, allow-incomplete-defs
"""Launching Triton kernels without having Triton look at their arguments each time.

To find the compiled kernel, and to ask the driver about every pointer, takes Triton longer than to
launch it, which shows where passes are so short that the GPU waits for the CPU. How a compiled kernel
is launched is no public API of Triton's, so in versions that were not read Triton launches by itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

READ = SpecifierSet(">=3.6,<3.10")
"""Versions of Triton whose launcher is known: 3.6 has been run, 3.9 compiled and read."""

_compiled: dict[Hashable, Any] = {}


@functools.cache
def launches_directly() -> bool:
    """Whether this Triton's launcher is known. Where it is not, the log says so once."""
    import triton

    if READ.contains(triton.__version__, prereleases=True):
        return True
    logging.getLogger(__name__).warning(
        "mixquant knows the launcher of Triton %s, not of %s: kernels take longer to launch",
        READ,
        triton.__version__,
    )
    return False


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[Any],
    constants: dict[str, Any],
    key: Hashable,
    **options: Any,
) -> None:
    """Launches ``kernel`` on the current stream of the device of the first tensor.

    Args:
        tensors, numbers: the kernel's arguments but for the constants, in order, tensors first.
        key: of the kernel and all that Triton would compile it anew for: the device, types, which
            tensors are None, the constants, and numbers that are not exempt from it. Not the alignment
            of tensors.
        options: of the compilation.
    """
    pointers: list[int | None] = []
    bits = 0
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
        else:
            pointers.append(at := tensor.data_ptr())
            bits |= at
    found = _compiled.get(key) if bits % 16 == 0 else None
    if found is not None:
        first: Any = tensors[0]
        stream = torch._C._cuda_getCurrentRawStream(first.device.index)
        run, function, metadata, values = found
        # As Triton's CompiledKernel does, without hooks for profilers of its own.
        run(*grid, stream, function, metadata, None, None, None, *pointers, *numbers, *values)
        return
    made = kernel[grid](*tensors, *numbers, **constants, **options)
    # None in Triton's interpreter.
    if bits % 16 == 0 and made is not None and launches_directly():
        values = tuple(constants.values())
        _compiled[key] = made.run, made.function, made.packed_metadata, values
