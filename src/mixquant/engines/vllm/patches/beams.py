"""Beam search: each of its steps tells the workers how long the first prompt was."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

from mixquant.engines.vllm.first_prompts import KEY
from mixquant.engines.vllm.log import logger

# Where `BeamSearchSequence` is defined, by version.
_MODULES = ("vllm.entrypoints.generate.beam_search.utils", "vllm.beam_search")


def install() -> None:
    """Has prompts of beam search say how long the first one was, in the process that takes requests."""
    from vllm.v1.engine.input_processor import InputProcessor

    for module in _MODULES:
        try:
            sequence = importlib.import_module(module).BeamSearchSequence
        except ImportError:
            continue
        _wrap(sequence, InputProcessor)
        return
    logger.warning(
        "mixquant does not know the beam search of this vLLM: tokens that beams generate would be "
        "quantized like a prompt; do not use beam search"
    )


def _wrap(sequence_class: Any, processor_class: Any) -> None:
    making, processing = sequence_class.get_prompt, processor_class.process_inputs
    if getattr(making, "mixquant", False):
        return

    @functools.wraps(making)
    def get_prompt(self: Any) -> Any:
        prompt = making(self)
        first = self.orig_prompt.get("prompt_token_ids")
        return prompt if first is None else {**prompt, KEY: len(first)}

    @functools.wraps(processing)
    def process_inputs(self: Any, request_id: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = processing(self, request_id, prompt, *args, **kwargs)
        length = prompt.get(KEY) if isinstance(prompt, dict) else None
        given = getattr(request.sampling_params, "extra_args", None) or {}
        # A client can set any key of them (`vllm_xargs`); only beam search may set this one.
        if length is not None or KEY in given:
            kept = {name: value for name, value in given.items() if name != KEY}
            if length is not None:
                kept[KEY] = length
            # A copy: the steps of several prompts share theirs.
            request.sampling_params = copy.copy(request.sampling_params)
            request.sampling_params.extra_args = kept or None
        return request

    get_prompt.mixquant = True  # type: ignore[attr-defined]
    sequence_class.get_prompt = get_prompt
    processor_class.process_inputs = process_inputs
