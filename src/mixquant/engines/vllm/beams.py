"""Beam search, which submits prompt and answer so far as a prompt, at every step.

The rule counts from the prompt as it was given first. vLLM knows that where it makes the prompt of a
step; from there the length travels with the sampling parameters to the workers.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import numpy as np

KEY = "mixquant_prompt_length"  # in a prompt, and in `extra_args` of its sampling parameters

_END = 2**31  # no prompt has as many tokens

# Where `BeamSearchSequence` is defined, by version.
_PLACES = ("vllm.entrypoints.generate.beam_search.utils", "vllm.beam_search")


def install() -> None:
    """Has prompts of beam search say how long the first one was, in the process that takes requests."""
    from vllm.v1.engine.input_processor import InputProcessor

    for place in _PLACES:
        try:
            sequence = importlib.import_module(place).BeamSearchSequence
        except ImportError:
            continue
        _wrap(sequence, InputProcessor)
        return


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


class FirstPrompts:
    """In a worker: how long the first prompts were of requests whose own holds generated tokens."""

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}

    def follow(self, scheduler_output: Any) -> None:
        """Takes note of requests that begin and end with this step of the scheduler."""
        for request in getattr(scheduler_output, "finished_req_ids", ()):
            self._lengths.pop(request, None)
        for new in getattr(scheduler_output, "scheduled_new_reqs", ()):
            length = (getattr(new.sampling_params, "extra_args", None) or {}).get(KEY)
            # A request that did not come through `process_inputs` can hold any value.
            if type(length) is int and 0 <= length < _END:
                self._lengths[new.req_id] = length

    def of(self, requests: list[str], prompt_lengths: np.ndarray) -> np.ndarray:
        """The lengths of the first prompts, ``[sequences]``, in tokens."""
        if not self._lengths:
            return prompt_lengths
        first = [
            self._lengths.get(request, length)
            for request, length in zip(requests, prompt_lengths, strict=True)
        ]
        return np.minimum(np.array(first, dtype=np.int64), prompt_lengths)
