"""One arm of a comparison on its way through the conversation: its KV cache, and what it measured."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.transformers import everything_in_prefill_format, phase
from mixquant.engines.transformers.counting import quantized_rows

_WARM_UP_TOKENS = 256
_WARM_UP_STEPS = 3


@dataclass
class TimedArm:
    """A model with its KV cache; passes through it are timed, and quantized rows are counted."""

    name: str
    model: Any
    quantize_all: bool
    cache: Any = None
    quantized_rows: int = 0
    prompt_tokens: list[int] = field(default_factory=list)  # per turn
    ttft: list[list[float]] = field(default_factory=list)  # per turn and round
    quantized_per_turn: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # per turn, [positions, V]
    own_answer: list[int] = field(default_factory=list)

    def read(self, tokens: list[int]) -> tuple[float, Tensor]:
        """Prefills a prompt in one pass; returns seconds and the next token's logits ``[V]``."""
        with quantized_rows(self.model) as rows, phase("prefill"):
            read = self._forward(tokens)
        self.quantized_rows = sum(rows)
        return read

    def step(self, token: int) -> tuple[float, Tensor]:
        """Decodes one token; returns seconds and the next token's logits ``[V]``."""
        return self._forward([token])

    def answer(self, first: Tensor, limit: int, ends: frozenset[int]) -> tuple[list[int], Tensor]:
        """Answers greedily, and then stands where it stood before.

        Args:
            first: ``[V]``, the logits of the first token.
            limit: of the answer, in tokens.
            ends: the tokens that end an answer.

        Returns:
            The answer, and the logits ``[len(answer), V]`` that its tokens were taken from.
        """
        before = self.cache
        self.cache = copy.deepcopy(before)
        logits = [first]
        written = [int(first.argmax())]
        while len(written) < limit and written[-1] not in ends:
            _, following = self.step(written[-1])
            logits.append(following)
            written.append(int(following.argmax()))
        self.cache = before
        return written, torch.stack(logits).cpu()

    def warm_up(self, tokens: list[int]) -> None:
        """Compiles, allocates and fills caches: what only the first passes pay."""
        self.read(tokens[:_WARM_UP_TOKENS])
        for token in tokens[:_WARM_UP_STEPS]:
            self.step(token)
        self.cache = None

    def _forward(self, tokens: list[int]) -> tuple[float, Tensor]:
        ids = torch.tensor([tokens], device=self.model.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.quantize_all:
                stack.enter_context(everything_in_prefill_format())
            start = _now(ids.device)
            output = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            seconds = _now(ids.device) - start
        self.cache = output.past_key_values
        return seconds, output.logits[0, -1]


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
