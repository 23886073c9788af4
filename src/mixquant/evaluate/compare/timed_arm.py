"""One arm of a comparison on its way through the conversation: its KV cache, and what it measured."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixquant.engines.transformers import everything_in_prefill_format, phase
from mixquant.engines.transformers.attention import as_decode_steps
from mixquant.engines.transformers.counting import quantized_rows
from mixquant.engines.transformers.passes import only_attention

_WARM_UP_TOKENS = 256
_WARM_UP_STEPS = 3


@dataclass
class TimedArm:
    """A model with its KV cache; passes through it are timed, and quantized rows are counted."""

    name: str
    model: Any
    quantize_all: bool = False
    only_attention: bool = False  # nothing is quantized, but attention is ours
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
            took, logits = self._forward(tokens)
        self.quantized_rows = sum(rows)
        return took, logits[-1]

    def step(self, token: int) -> tuple[float, Tensor]:
        """Decodes one token; returns seconds and the next token's logits ``[V]``."""
        took, logits = self._forward([token])
        return took, logits[-1]

    def read_answer(self, tokens: list[int]) -> list[Tensor]:
        """Reads a piece of an answer in one pass, as decode; the logits ``[V]`` behind each token."""
        if not tokens:
            return []
        with as_decode_steps():
            return list(self._forward(tokens, len(tokens))[1])

    def own(
        self,
        before: Any,
        written: list[int],
        choices: list[int],
        limit: int,
        ends: frozenset[int],
    ) -> list[int]:
        """This arm's own greedy answer; the cache is the one behind it afterwards.

        Args:
            before: the cache behind the prompt.
            written: the answer that the arm was made to write.
            choices: what it would have written in place of each token of that.
            limit: of the answer, in tokens.
            ends: the tokens that end an answer.
        """
        pairs = zip(written, choices, strict=True)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if same is None:
            return written
        own = [*written[:same], choices[same]]
        self.cache = before
        self.read_answer(own[:-1])
        while len(own) < limit and own[-1] not in ends:
            own.append(int(self.step(own[-1])[1].argmax()))
        return own

    def warm_up(self, tokens: list[int]) -> None:
        """Compiles, allocates and fills caches: what only the first passes pay."""
        self.read(tokens[:_WARM_UP_TOKENS])
        for token in tokens[:_WARM_UP_STEPS]:
            self.step(token)
        self.cache = None

    def _forward(self, tokens: list[int], keep: int = 1) -> tuple[float, Tensor]:
        ids = torch.tensor([tokens], device=self.model.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.quantize_all:
                stack.enter_context(everything_in_prefill_format())
            if self.only_attention:
                stack.enter_context(only_attention())
            start = _now(ids.device)
            output = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            )
            seconds = _now(ids.device) - start
        self.cache = output.past_key_values
        return seconds, output.logits[0]


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
