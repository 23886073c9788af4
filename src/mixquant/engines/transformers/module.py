"""The module that stands in for `torch.nn.Linear` in a prepared model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.prefill import check_is_of
from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.fingerprint import Origin, changed
from mixquant.core.phase import Range, plan_in_force
from mixquant.core.rows import Part, phase_linear
from mixquant.errors import MixquantError
from mixquant.formats import BY_NAME


class PrepareError(MixquantError, ValueError):
    """A model that cannot be prepared. The message is one line and says what to do."""


class PhaseLinear(nn.Linear):
    """A linear layer that multiplies each row in the precision of its phase.

    Made by `adopt`, which changes the class of a Linear in place: its weight, its hooks and every
    reference to it stay as they are, and the weight is not copied. The quantized copy is no part of
    the state dict: it is made from the weight, again whenever the weight changes.
    """

    name: str  # full and dotted, as the model was prepared
    layout: tuple[tuple[Range, str, dict[str, Any]], ...]  # features, format, options, per part
    why_precise: str | None
    prefill_model: str | None  # of the recipe
    _copy: tuple[tuple[Part, ...], Origin] | None

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        name: str,
        layout: tuple[tuple[Range, str, dict[str, Any]], ...],
        why_precise: str | None = None,
        prefill_model: str | None = None,
    ) -> PhaseLinear:
        """Turns ``linear`` itself into a PhaseLinear whose output features have this layout.

        Args:
            name: of the layer, for messages.
            layout: for each part, in order: its output features ``(start, stop)``, its format
                (``bf16`` for one that is always precise), and options of the format's quantizers.
            why_precise: why parts in ``bf16`` are.
            prefill_model: the recipe's.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.name = name
        linear.layout = layout
        linear.why_precise = why_precise
        linear.prefill_model = prefill_model
        linear._copy = None
        return linear

    def set_copy(self, parts: tuple[Part, ...]) -> None:
        """Takes a quantized copy that was made from the weight as it is now."""
        self._copy = parts, Origin(self.weight)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The quantized copy, made on first use and made again once the weight has changed.

        A change through ``weight.data`` is not noticed here but in `renew`.
        """
        copy = self._copy
        if copy is None or not copy[1].looks_like(self.weight):
            return self.requantize()
        return copy[0]

    def requantize(self) -> tuple[Part, ...]:
        """Makes the quantized copy again.

        Raises:
            PrepareError: a weight that is not in memory, holds NaN or infinity, or has other rows
                than before in a layer of several parts.
            CheckpointError: the weight is no longer that of the prefill_model.
        """
        refuse_unfit(self.name, self.weight)
        before, rows = self.layout[-1][0][1], self.weight.shape[0]
        if rows != before:  # an output head for more tokens, say
            if len(self.layout) > 1:
                raise PrepareError(
                    f"the weight of {self.name} has {rows} rows now, not {before}, and its parts are "
                    "no longer known; load the model again and prepare it as it is then"
                )
            self.layout = (((0, rows), *self.layout[0][1:]),)
        parts = quantize_parts(self.weight, self.layout, self.name, self.prefill_model)
        self.set_copy(parts)
        return parts

    def forward(self, input: Tensor) -> Tensor:
        if precise_and_eager():
            return nn.functional.linear(input, self.weight, self.bias)
        return _forward(self, input)

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's packed weights can be neither pickled nor copied.
        return {**self.__dict__, "_copy": None}


def phase_linears(model: nn.Module) -> list[PhaseLinear]:
    """The layers of a model that were prepared, wherever in it they are by now."""
    return [module for module in model.modules() if isinstance(module, PhaseLinear)]


def renew(model: nn.Module) -> None:
    """Makes the quantized copies again whose weights have changed, in whatever way.

    By a sample of each weight, so a change of single elements through ``weight.data`` may go
    unnoticed; one of a whole row or column does not.

    Raises:
        PrepareError: a weight that is not in memory, or holds NaN or infinity now.
    """
    layers = phase_linears(model)
    held = [(layer, layer._copy) for layer in layers]
    pairs = [(copy[1], layer.weight) for layer, copy in held if copy is not None]
    stale = iter(changed(pairs))
    for layer, copy in held:
        if copy is None or next(stale):
            layer.requantize()


def refuse_unfit(name: str, weight: Tensor) -> None:
    """Raises PrepareError if a weight is not in memory, or holds NaN or infinity."""
    if weight.device.type == "meta":
        raise PrepareError(
            f"the weight of {name} is not in memory (offloaded); load the model without offloading"
        )
    if not torch.isfinite(weight).all():
        raise PrepareError(f"the weight of {name} holds NaN or infinity; the checkpoint is damaged")


def precise_and_eager() -> bool:
    """Whether no plan is in force, asked in a way that compiled code does not keep the answer."""
    return not torch.compiler.is_compiling() and plan_in_force() is None


@torch.compiler.disable
def _forward(layer: PhaseLinear, input: Tensor) -> Tensor:
    plan = plan_in_force()
    rows = input.numel() // input.shape[-1]
    if plan is None or plan.rows != rows or not plan.quantized:
        return nn.functional.linear(input, layer.weight, layer.bias)
    parts = layer.parts
    if all(part.weight is None for part in parts):
        return nn.functional.linear(input, layer.weight, layer.bias)
    with torch.no_grad():
        out = phase_linear(input, layer.weight, layer.bias, parts, plan)
    return without_gradient(out, input, layer.weight, layer.bias)


def without_gradient(out: Tensor, *sources: Tensor | None) -> Tensor:
    """``out``, which refuses to be differentiated if something that it was made of wants that.

    Args:
        out: made under `torch.no_grad` in a pass that quantizes rows.
        sources: what it was made of.
    """
    wanted = torch.is_grad_enabled() and any(
        source is not None and source.requires_grad for source in sources
    )
    result: Tensor = _NotDifferentiable.apply(out, *sources) if wanted else out  # type: ignore[no-untyped-call]
    return result


class _NotDifferentiable(torch.autograd.Function):
    """Refuses in backward, not in forward: whoever forgets `torch.no_grad` only wants the result."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor | None) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "a quantized prefill has no gradients; run the pass outside mixquant.phase('prefill') "
            "(all rows are precise there), or load the model without mixquant to train it"
        )


@torch.no_grad()
def quantize_parts(
    weight: Tensor,
    layout: tuple[tuple[Range, str, dict[str, Any]], ...],
    name: str = "",
    prefill_model: str | None = None,
) -> tuple[Part, ...]:
    """Quantizes a weight ``[N, K]`` part by part, for the kernels of the device it is on.

    A part that its kernel cannot hold stays BF16: the layout may be another device's.

    Args:
        name: of the layer.
        prefill_model: the checkpoint that a part is taken from if it has the layer in the part's format.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weight is not this one.
    """
    parts = []
    for (start, stop), of, options in layout:
        if of == "bf16":
            parts.append(Part((start, stop), of, None))
            continue
        fmt = BY_NAME[of]
        kernel = fmt.kernel(weight.device)
        if fmt.why_not(stop - start, weight.shape[1], kernel) is not None:
            parts.append(Part((start, stop), "bf16", None))
            continue
        mine = weight[start:stop].detach()
        if prefill_model is not None and opened(prefill_model).format_of(name) == of:
            whole = opened(prefill_model).layer(name)
            if whole.shape != tuple(weight.shape):
                raise CheckpointError(
                    f"{name} is {list(weight.shape)}, in {prefill_model} {list(whole.shape)}; both must "
                    "be the same model"
                )
            stored = whole.rows(start, stop)
            check_is_of(stored, mine, name)
            quantized: Any = stored.weight_for(kernel, weight.device)
        else:
            quantized = fmt.quantize_weight(mine, kernel, **options)
        parts.append(Part((start, stop), of, quantized, options))
    return tuple(parts)
