"""Whether a model's weights are plain tensors: told by what is in memory, not by how it was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_KINDS = (Tensor, nn.Parameter)  # not their subclasses, in which libraries keep quantized weights


def why_not_plain(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """What among these modules is not held in plain BF16, FP16 or FP32 tensors, or None.

    A checkpoint that was dequantized as it was loaded is plain, whatever its configuration says.
    """
    for name, module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            if not _is_plain(parameter):
                return f"the weight {name}.{key} is {_described(parameter)}"
        if is_other_linear(module) and not _is_plain(getattr(module, "weight", None)):
            return f"the layer {name} is a {type(module).__module__}.{type(module).__name__}"
    return None


def is_other_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its features, but not torch's own, and holds none."""
    if type(module) is nn.Linear or any(isinstance(one, nn.Linear) for one in _inside(module)):
        return False
    return isinstance(module, nn.Linear) or all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def _is_plain(weight: Any) -> bool:
    return type(weight) in _KINDS and weight.is_floating_point() and weight.itemsize > 1


def _described(weight: Tensor) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return dtype if type(weight) in _KINDS else f"a {type(weight).__name__} ({dtype})"


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (one for one in module.modules() if one is not module)
