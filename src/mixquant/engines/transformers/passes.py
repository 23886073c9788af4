"""Tells the rule where each forward pass of a prepared model stands.

`generate` knows where the prompt ends, and only there: what follows may be one pass or many, hold
draft tokens, go through an assistant model or rearrange beams. So the prompt's length is recorded at
the outermost `generate`, and each pass is told by the tokens already cached plus the offset in the
pass. Outside `generate` the user says the phase, with `phase`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers.generation.configuration_utils import GenerationMode

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.engines.transformers import attention
from mixquant.engines.transformers.methods import put_in_front
from mixquant.engines.transformers.module import PrepareError, renew


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch. They end at the same column, and shorter ones begin with padding."""

    columns: int
    padding: np.ndarray  # [sequences], columns of padding on the left

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Prompts:
        """The prompts of an attention mask ``[sequences, columns]``."""
        leading = (mask != 0).cpu().cumsum(dim=1) == 0  # not every device can
        return cls(mask.shape[1], leading.sum(dim=1).numpy())


@dataclass
class _Generation:
    """One call of `generate` on a prepared model, or one block in which the user said the phase."""

    model: weakref.ref[nn.Module] | None  # None: whichever prepared model runs inside
    prompts: Prompts | None = None
    # For caches that keep their length in a tensor, which would have to be fetched from the device.
    columns_seen: int | None = None
    columns_given: int | None = None  # to `generate`, cached ones among them or not


@dataclass
class _Said(_Generation):
    """A phase that the user said, for direct calls of `forward`."""

    said: Literal["prefill", "decode"] = "decode"
    prompt_lengths: np.ndarray | None = (
        None  # [sequences] or [1]; None: the prompt ends with the pass
    )


_current: ContextVar[_Generation | None] = ContextVar("mixquant_generation", default=None)
_quantize_everything: ContextVar[bool] = ContextVar("mixquant_quantize_everything", default=False)
_only_attention: ContextVar[bool] = ContextVar("mixquant_only_attention", default=False)


@contextmanager
def phase(
    name: Literal["prefill", "decode"], prompt_length: int | Sequence[int] | None = None
) -> Iterator[None]:
    """Sets the phase of direct calls of a prepared model's `forward` inside the block.

    A call without a phase is decode: all its rows are precise. `generate` sets the phase by itself.

    Args:
        name: ``prefill``: the rows of the calls are prompt tokens up to the prompt's length;
            ``decode``: no row is a prompt token.
        prompt_length: for ``prefill``, in tokens without padding: one number for all sequences, or
            one for each. Give it if a prompt is read in several calls, so that only the last call
            ends the prompt. None: each call ends the prompt.

    Raises:
        ValueError: another phase, a negative length, or a length without ``prefill``.
    """
    if name not in ("prefill", "decode"):
        raise ValueError(f"unknown phase {name!r}; expected 'prefill' or 'decode'")
    lengths = None
    if prompt_length is not None:
        lengths = np.atleast_1d(np.asarray(prompt_length, dtype=np.int64))
        if name != "prefill" or (lengths < 0).any() or lengths.ndim != 1:
            raise ValueError(
                "prompt_length goes with phase 'prefill' and is a number of tokens, or one per "
                f"sequence; got {prompt_length!r} with phase {name!r}"
            )
    token = _current.set(_Said(None, said=name, prompt_lengths=lengths))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def everything_in_prefill_format() -> Iterator[None]:
    """Quantizes every row of both phases inside the block: the arm that mixquant is compared with."""
    token = _quantize_everything.set(True)
    try:
        yield
    finally:
        _quantize_everything.reset(token)


@contextmanager
def only_attention() -> Iterator[None]:
    """Quantizes nothing inside the block: the rows that would be attend in our kernel, in BF16.

    So a comparison tells what the kernel gains from what quantizing does. It counts where `prepare`
    chose the kernel.
    """
    token = _only_attention.set(True)
    try:
        yield
    finally:
        _only_attention.reset(token)


def watch(model: nn.Module, thresholds: Thresholds, everywhere: bool) -> None:
    """Makes every forward pass of a prepared model run under its plan, or quantized everywhere."""
    model.mixquant_thresholds = thresholds  # type: ignore[assignment]
    model.mixquant_everywhere = everywhere  # type: ignore[assignment]
    put_in_front(model, "forward", _forward)
    put_in_front(model, "generate", _generate)
    put_in_front(model, "_prepare_cache_for_generation", _prepare_cache)
    for name in (
        "generate_batch",
        "init_continuous_batching",
        "continuous_batching_context_manager",
    ):
        if hasattr(model, name):
            put_in_front(model, name, _refuse_continuous_batching)


def _forward(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Not traced: compiled code would keep the plan of the pass that it was compiled in.
    plan = _untraced_plan(model, inspect.signature(original) if args else None, args, kwargs)
    with in_force(plan):
        return original(*args, **kwargs)


def _generate(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    drafting = bool(getattr(config, "is_assistant", None))
    outer = _current.get()
    if outer is not None and outer.model is not None and outer.model() is model and not drafting:
        return original(*args, **kwargs)  # a decoding method that calls `generate` itself
    given = kwargs.get("inputs_embeds")
    if given is None:
        given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    columns = given.shape[1] if isinstance(given, torch.Tensor) and given.ndim > 1 else None
    generation = _Generation(weakref.ref(model), columns_given=columns)
    # An assistant is asked to generate once a round, with all that was accepted so far as its
    # prompt. Its configuration lives as long as the rounds do and its first prompt is the real one.
    if drafting:
        generation.prompts = getattr(config, "_mixquant_prompts", None)
    token = _current.set(generation)
    try:
        return original(*args, **kwargs)
    finally:
        _current.reset(token)
        if config is not None and drafting:
            config._mixquant_prompts = generation.prompts


def _prepare_cache(
    original: Callable[..., Any],
    model: nn.Module,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Records the prompts. Every decoding method of `generate` comes by here, its mask complete."""
    generation = _current.get()
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        prompts = Prompts.from_mask(mask)
    elif (columns := getattr(generation_config, "_mask_length", None)) is not None:
        prompts = Prompts(columns, np.zeros(1, dtype=np.int64))
    else:
        prompts = None
    cache = model_kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size cannot be combined with past_key_values that hold tokens: "
                "Transformers reads those a second time. Leave out prefill_chunk_size."
            )
        if (
            generation_mode == GenerationMode.ASSISTED_GENERATION
            and generation is not None
            and prompts is not None
            and generation.columns_given == prompts.columns
        ):
            raise ValueError(
                "assisted and prompt-lookup decoding cannot be given tokens that past_key_values "
                "hold already: Transformers reads those a second time. Pass the new tokens only, "
                "with the attention mask of all."
            )
    if generation is not None and generation.prompts is None:
        generation.prompts = prompts
    return original(generation_config, model_kwargs, generation_mode, *args, **kwargs)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "continuous batching (generate_batch, cache_implementation='paged') does not tell prompt "
        "lengths to mixquant; call generate with a left-padded batch, or serve the model with vLLM"
    )


@torch.compiler.disable
def _untraced_plan(
    model: nn.Module,
    signature: inspect.Signature | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PhasePlan | None:
    if signature is not None:
        kwargs = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
    plan = _plan(model, kwargs)
    if plan is not None:
        attention.install()
        checkpointing = model.training and getattr(model, "is_gradient_checkpointing", False)
        if checkpointing and torch.is_grad_enabled():
            raise PrepareError(
                "a quantized prefill has no gradients, and gradient checkpointing would compute it a "
                "second time in BF16; run it under torch.no_grad()"
            )
        if not (_everything(model) and _is_step(kwargs)):
            renew(model)
    return plan


def _everything(model: nn.Module) -> bool:
    return _quantize_everything.get() or bool(model.mixquant_everywhere)


def _is_step(kwargs: dict[str, Any]) -> bool:
    """Whether a pass reads one token behind others, as decode does."""
    inputs, cache = _inputs(kwargs), kwargs.get("past_key_values")
    if inputs is None or inputs.shape[1] != 1 or cache is None:
        return False
    return int(cache.get_seq_length()) > 0


def _inputs(kwargs: dict[str, Any]) -> Any:
    inputs = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if inputs is None else inputs


def _plan(model: nn.Module, kwargs: dict[str, Any]) -> PhasePlan | None:
    inputs = _inputs(kwargs)
    if inputs is None:
        return None
    sequences, columns = inputs.shape[:2]
    if _everything(model):
        return everything_quantized(sequences * columns)
    generation = _current.get()
    if generation is None or (generation.model is not None and generation.model() is not model):
        return None

    cached = _columns_cached(generation, kwargs.get("past_key_values"), columns)
    if isinstance(generation, _Said):
        if generation.said == "decode":
            return None
        mask = kwargs.get("attention_mask")
        padding = np.zeros(sequences, dtype=np.int64)
        lengths = generation.prompt_lengths
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            padding = Prompts.from_mask(mask).padding
            tokens = (mask != 0).sum(dim=1).cpu().numpy()
        else:
            tokens = np.full(sequences, cached + columns)
        if lengths is None:
            lengths = tokens
        elif len(lengths) not in (1, sequences):
            raise ValueError(
                f"phase('prefill') was given {len(lengths)} prompt lengths for {sequences} sequences"
            )
        lengths = np.broadcast_to(lengths, (sequences,))
    else:
        prompts = generation.prompts
        if prompts is None or sequences % len(prompts.padding):
            return None
        # Beams and returned sequences stand next to each other, and share their prompt's padding.
        padding = np.repeat(prompts.padding, sequences // len(prompts.padding))
        lengths = prompts.columns - padding
    thresholds = model.mixquant_thresholds
    assert isinstance(thresholds, Thresholds)
    plan = plan_pass(thresholds, cached - padding, np.full(sequences, columns), lengths)
    if plan.quantized and _only_attention.get():
        return attention.plan_of_attention_alone(plan)
    return plan if plan.quantized else None


def _columns_cached(generation: _Generation, cache: Any, columns: int) -> int:
    if cache is None:
        return 0
    if generation.columns_seen is None:
        length = cache.get_seq_length()
        if not isinstance(length, torch.Tensor):
            return int(length)
        generation.columns_seen = int(length)
    cached = generation.columns_seen
    generation.columns_seen += columns
    return cached
