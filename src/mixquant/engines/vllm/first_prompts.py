"""How long the first prompt was of a request whose prompt holds generated tokens.

Beam search submits prompt and answer so far as a prompt, at every step. The rule counts from the prompt
as it was given first. Its length travels with the sampling parameters to the workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

KEY = "mixquant_prompt_length"
"""In a prompt, and in ``extra_args`` of its sampling parameters."""

_END = 2**31  # no prompt has as many tokens


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
