"""Attention of quantized rows on a CPU: INT8 or BF16 in our kernel, all other rows in SDPA.

Transformers asks its table of attention functions for ``sdpa``. What stands there is put behind a
function that calls it for every module which was not chosen here and in every pass that quantizes no
row. Which rows go to the kernel: `mixquant.engines.transformers.attended_rows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixquant.core.phase import PhasePlan, Range, plan_in_force
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers.attended_rows import AttendedRows
from mixquant.engines.transformers.module import precise_and_eager, without_gradient
from mixquant.kernels.cpu import attention as kernel
from mixquant.kernels.cpu.attention import Precision

_CHOSEN = "mixquant_attention"  # the precision, on an attention module that was chosen

# What models hand to an attention function without changing what it is to compute.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "sliding_window",  # in the mask
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "logits_to_keep",
    "num_items_in_batch",
}

Result = tuple[Tensor, Tensor | None]


def plan_of_attention_alone(plan: PhasePlan) -> PhasePlan:
    """A plan in which the quantized rows attend in our BF16, and nothing is quantized."""
    alone = PhasePlan(plan.rows, (), ((0, plan.rows),))
    alone.derived(AttendedRows, lambda _: AttendedRows(plan.quantized, "bf16"))
    return alone


_as_steps: ContextVar[bool] = ContextVar("mixquant_as_steps", default=False)


@contextmanager
def as_decode_steps() -> Iterator[None]:
    """Inside the block all rows attend in SDPA, as a decode step does, whatever the plan.

    So a piece of an answer can be read in one pass, where every row is quantized, too.
    """
    token = _as_steps.set(True)
    try:
        yield
    finally:
        _as_steps.reset(token)


_seen: ContextVar[list[tuple[nn.Module, str | None]] | None] = ContextVar(
    "mixquant_seen", default=None
)


@contextmanager
def modules_that_attend() -> Iterator[list[tuple[nn.Module, str | None]]]:
    """A list that gets every module that calls SDPA inside the block, and why not the kernel."""
    install()
    seen: list[tuple[nn.Module, str | None]] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def choose(
    model: PreTrainedModel, recipe: Recipe, seen: list[tuple[nn.Module, str | None]]
) -> str | None:
    """Chooses the attention of a model's quantized rows, and says in a line what it is.

    Args:
        recipe: with everything decided.
        seen: of a trial pass, from `modules_that_attend`.

    Returns:
        None where the recipe asks for nothing, or the model is not on a CPU.
    """
    if not wants_kernel(model, recipe):
        return None
    wanted: Precision = "bf16" if recipe.prefill_attention == "bf16" else "int8"
    why = _why_not_model(model, seen) or kernel.why_unavailable(wanted)
    if why is not None:
        return f"attention: PyTorch's ({why})"
    reasons = dict(seen)
    chosen = [module for module, reason in reasons.items() if reason is None]
    for module in chosen:
        setattr(module, _CHOSEN, wanted)
    said = []
    if chosen:
        said.append(f"{wanted.upper()} in our kernel, {len(chosen)} layers")
        windows = sum(getattr(module, "sliding_window", None) is not None for module in chosen)
        if windows:
            said.append(f"in {windows} of them PyTorch's from where their sliding window is full")
    for reason, count in Counter(filter(None, reasons.values())).items():
        said.append(f"PyTorch's in {count} layers ({reason})")
    return f"attention of quantized rows: {'; '.join(said)}"


def attends_faster_in_bf16(model: nn.Module) -> bool:
    """Whether the kernel was chosen for a prepared model, and is faster than SDPA in BF16, too."""
    chosen = any(_CHOSEN in vars(module) for module in model.modules())
    return chosen and kernel.why_unavailable("bf16") is None


def wants_kernel(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Whether a resolved recipe has the quantized rows of a model attend in the kernel."""
    assert isinstance(recipe.format, dict)
    quantizes = set(recipe.format.values()) != {"bf16"}
    asked = recipe.prefill_attention == "int8" or (
        quantizes and recipe.prefill_attention in ("auto", "bf16")
    )
    return asked and model.device.type == "cpu" and recipe.role == "both"


def _why_not_model(model: PreTrainedModel, seen: list[Any]) -> str | None:
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "mixquant_sdpa"):  # the latter calls the former
        return f"the model was loaded with attn_implementation {implementation!r}, not 'sdpa'"
    return None if seen else "no layer of this model calls it as known"


def install() -> None:
    """Puts `_sdpa` in Transformers' table, in front of whatever stands there as ``sdpa``."""
    global _stock
    now = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if now is not _sdpa:
        _stock = now
        ALL_ATTENTION_FUNCTIONS.register("sdpa", _sdpa)


_stock: Callable[..., Result] = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> Result:
    if not torch.compiler.is_compiling() and (seen := _seen.get()) is not None:
        seen.append((module, why_not_kernel(module, *args, **kwargs)))
    if _CHOSEN not in vars(module) or precise_and_eager():
        return _stock(module, *args, **kwargs)
    return _attend(module, *args, **kwargs)


def why_not_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> str | None:
    """Why a call of an attention function is not the kernel's, whatever the mask holds, or None."""
    size = query.shape[-1]
    if query.device.type != "cpu" or any(x.dtype != torch.bfloat16 for x in (query, key, value)):
        return f"it is in {str(query.dtype).removeprefix('torch.')}"
    if size % 32 or size > kernel.MAX_HEAD_SIZE or key.shape != value.shape:
        return f"heads of {size}" + (f" and {value.shape[-1]}" if value.shape[-1] != size else "")
    if key.shape[-1] != size or query.shape[1] % key.shape[1]:
        return "its heads do not go together"
    if dropout or not (scaling is None or scaling > 0):
        return f"dropout {dropout}, scaling {scaling}"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and not causal:
        return "it is not causal"
    others = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if others:
        return f"{', '.join(others)}"
    return None


@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Result:
    plan = plan_in_force()
    sequences, _, rows, size = query.shape
    # One row behind others is decode, in whatever plan.
    if (
        plan is None
        or plan.rows != sequences * rows
        or rows == 1
        or _as_steps.get()
        or args  # by position, so not as Transformers' own models call it
        or why_not_kernel(module, query, key, value, mask, *args, **kwargs) is not None
    ):
        return _stock(module, query, key, value, mask, *args, **kwargs)
    attended = plan.derived(AttendedRows, lambda plan: AttendedRows(plan.quantized))
    found = attended.under(mask, sequences, rows, key.shape[2])
    if found is None:
        return _stock(module, query, key, value, mask, *args, **kwargs)

    scale = kwargs.get("scaling") or size**-0.5

    def stock(which: slice | list[int], start: int, stop: int) -> Tensor:
        """Rows of some sequences, in SDPA."""
        end = found.context + stop
        own: Tensor | None
        if stop - start == 1 and not any(found.padding):
            own = None  # it sees every key up to its own
        elif mask is None:
            own = torch.ones(stop - start, end, dtype=torch.bool).tril_(found.context + start)
            own = own.expand(1, 1, -1, -1)
        else:
            own = mask.expand(sequences, -1, -1, -1)[which][:, :, start:stop, :end]
        q, k, v = query[which][:, :, start:stop], key[which][:, :, :end], value[which][:, :, :end]
        if stop - start == 1:
            # One row of each of a group's heads, as rows of one head: a fifth of SDPA's time.
            grouped = q.reshape(len(q), k.shape[1], -1, size)
            y = nn.functional.scaled_dot_product_attention(grouped, k, v, own, scale=scale)
            return y.reshape(len(q), 1, -1, size)
        return _stock(module, q, k, v, own, *args, **kwargs)[0]

    with torch.no_grad():
        out = query.new_empty(sequences, rows, query.shape[1], size)
        keys = found.context + rows
        kernel.attend(
            _dense(query),
            _dense(key[:, :, :keys]),
            _dense(value[:, :, :keys]),
            found.rows,
            found.padding,
            scale,
            attended.precision or vars(module)[_CHOSEN],
            out.transpose(1, 2),
        )
        others: dict[Range, list[int]] = {}
        for sequence, (start, stop) in enumerate(found.rows):
            for piece in ((0, start), (stop, rows)) if start < stop else ((0, rows),):
                if piece[0] < piece[1]:
                    others.setdefault(piece, []).append(sequence)
        for (start, stop), which in others.items():
            every = slice(None) if len(which) == sequences else which
            out[every, start:stop] = stock(every, start, stop)
    return without_gradient(out, query, key, value), None


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
