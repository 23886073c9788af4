"""The module that stands in for `torch.nn.Linear` in a prepared model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixquant.formats import BY_NAME
from mixquant.linear import Part, phase_linear
from mixquant.phase import Range, plan_in_force


class PhaseLinear(nn.Linear):
    """A linear layer that multiplies each row in the precision of its phase.

    Made by `adopt`, which changes the class of a Linear in place: its weight, its hooks and every
    reference to it stay as they are, and the weight is not copied. The quantized copy is no part of
    the state dict: it is made from the weight, again whenever the weight changes.
    """

    layout: tuple[tuple[Range, str, dict[str, Any]], ...]  # features, format, options, per part
    _parts: tuple[Part, ...] | None
    _quantized_from: tuple[Any, ...]

    @classmethod
    def adopt(
        cls, linear: nn.Linear, layout: tuple[tuple[Range, str, dict[str, Any]], ...]
    ) -> PhaseLinear:
        """Turns ``linear`` itself into a PhaseLinear whose output features have this layout.

        Args:
            layout: for each part, in order: its output features ``(start, stop)``, its format
                (``bf16`` for one that is always precise), and options of the format's quantizers.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.layout = layout
        linear._parts = None
        return linear

    def hold(self, parts: tuple[Part, ...]) -> None:
        """Takes a quantized copy that was made from the weight as it is now."""
        self._parts = parts
        self._quantized_from = self._weight_state()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The quantized copy, made on first use and made again once the weight has changed."""
        if self._parts is None or self._quantized_from != self._weight_state():
            self.hold(quantize_parts(self.weight, self.layout))
        assert self._parts is not None
        return self._parts

    def forward(self, input: Tensor) -> Tensor:
        if precise_and_eager():
            return nn.functional.linear(input, self.weight, self.bias)
        return _forward(self, input)

    def _weight_state(self) -> tuple[Any, ...]:
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        return (weight.data_ptr(), version, weight.dtype, weight.device)

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's packed weights can be neither pickled nor copied.
        return {**self.__dict__, "_parts": None}


def precise_and_eager() -> bool:
    """Whether no plan is in force, asked in a way that compiled code does not keep the answer."""
    return not torch.compiler.is_compiling() and plan_in_force() is None


@torch.compiler.disable
def _forward(layer: PhaseLinear, input: Tensor) -> Tensor:
    plan = plan_in_force()
    if plan is None:
        return nn.functional.linear(input, layer.weight, layer.bias)
    return phase_linear(input, layer.weight, layer.bias, layer.parts, plan)


@torch.no_grad()
def quantize_parts(
    weight: Tensor, layout: tuple[tuple[Range, str, dict[str, Any]], ...]
) -> tuple[Part, ...]:
    """Quantizes a weight ``[N, K]`` part by part, for the kernels of the device it is on."""
    parts = []
    for (start, stop), name, options in layout:
        if name == "bf16":
            parts.append(Part((start, stop), name, None))
            continue
        fmt = BY_NAME[name]
        quantized = fmt.quantize_weight(
            weight[start:stop].detach(), fmt.kernel(weight.device), **options
        )
        parts.append(Part((start, stop), name, quantized, options))
    return tuple(parts)
