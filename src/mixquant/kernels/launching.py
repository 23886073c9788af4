# mypy: allow-untyped-defs, allow-incomplete-defs
"""Launching Triton kernels without having Triton find the compiled one each time.

To find it takes Triton as long as to launch it, which shows where passes are so short that the GPU
waits for the CPU.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    key: Hashable,
    stream: torch.cuda.Stream | None = None,
    **options: Any,
) -> None:
    """Launches ``kernel``, on ``stream`` or the current one.

    Args:
        arguments: all but the constants, which are the kernel's last parameters.
        key: all that Triton would compile the kernel anew for (types, devices, the divisibility of
            numbers that are not exempt from it), but for ``constants`` and the alignment of pointers.
        options: of the compilation, the same for equal keys and constants.
    """
    aligned = not any(isinstance(one, torch.Tensor) and one.data_ptr() % 16 for one in arguments)
    whole = (kernel, key, *constants.values()) if aligned else None
    if (found := _compiled.get(whole)) is not None:
        on = None if stream is None else stream.cuda_stream
        found[grid](*arguments, *constants.values(), stream=on)
        return
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        found = kernel[grid](*arguments, **constants, **options)
    if whole is not None and found is not None:  # None in Triton's interpreter
        _compiled[whole] = found
