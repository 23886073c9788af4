"""The requests of each workload: by prompt length, by batch size, by concurrency, turns, and an agent
trace.

A point is one setting of one workload. It runs several times, each time with its own prompts, so no
run finds those of another in a prefix cache. All arms read the same prompts. A turn is new tokens behind
others that the warm-up has put into the prefix cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixquant.bench.trace import Request, Session, turns

Workload = Literal["length", "batch", "concurrency", "turns", "agent"]

# A closed loop has this many requests for each one in flight, so that prefill and decode overlap.
ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """The workloads that the user chose. Empty: the workload is left out."""

    lengths: tuple[int, ...]  # in tokens
    batches: tuple[int, ...]
    concurrencies: tuple[int, ...]
    turns: tuple[int, ...]  # new tokens
    cached: tuple[int, ...]  # tokens before each turn
    sessions: tuple[Session, ...]
    prompt_tokens: int  # of each prompt of batches and concurrencies
    output_tokens: int
    seed: int


@dataclass(frozen=True)
class LoadPoint:
    """One setting of one workload.

    Attributes:
        tokens: of each prompt, without those ``cached``; of an agent trace, the mean, rounded.
        concurrency: requests in flight at once; of an agent trace, sessions.
        prompt_tokens: of all requests of a run together.
        longest: tokens that one of its requests reads and writes.
        run: a number to the requests of that run: lists whose requests follow one another. Number 0 is
            the warm-up, which is not counted.
    """

    workload: Workload
    tokens: int
    concurrency: int
    prompt_tokens: int
    longest: int
    run: Callable[[int], list[list[Request]]]
    cached: int | None = None  # tokens before those, where there are turns

    @property
    def name(self) -> str:
        if self.cached is not None:
            return f"{self.workload}, {self.tokens} tokens behind {self.cached}"
        at_once = f", {self.concurrency} at once" if self.concurrency > 1 else ""
        return f"{self.workload}, {self.tokens} tokens{at_once}"


def points(plan: Plan, tokenizer: Any) -> list[LoadPoint]:
    """Every point of a plan, in the order in which they are run."""
    vocabulary = plain_tokens(tokenizer)

    def of_random_tokens(workload: Workload, tokens: int, at_once: int, requests: int) -> LoadPoint:
        def run(number: int) -> list[list[Request]]:
            key = zlib.crc32(f"{workload} {tokens} {at_once} {number}".encode())
            generator = np.random.default_rng((plan.seed, key))
            ids = generator.choice(vocabulary, (requests if number else at_once, tokens))
            return [[Request(tuple(row), plan.output_tokens)] for row in ids.tolist()]

        longest = tokens + plan.output_tokens
        return LoadPoint(workload, tokens, at_once, tokens * requests, longest, run)

    found = [of_random_tokens("length", tokens, 1, 1) for tokens in plan.lengths]
    found += [of_random_tokens("batch", plan.prompt_tokens, size, size) for size in plan.batches]
    found += [
        of_random_tokens("concurrency", plan.prompt_tokens, at_once, ROUNDS * at_once)
        for at_once in plan.concurrencies
    ]
    found += [
        _turn_point(plan, vocabulary, cached, new) for cached in plan.cached for new in plan.turns
    ]
    if plan.sessions:
        numbers = plan.concurrencies or (1,)
        # No more at once than there are.
        for at_once in sorted({min(number, len(plan.sessions)) for number in numbers}):
            found.append(_agent_point(plan, tokenizer, at_once))
    return found


def _turn_point(
    plan: Plan, vocabulary: np.ndarray[Any, np.dtype[np.int64]], cached: int, new: int
) -> LoadPoint:
    def random_tokens(what: str, tokens: int) -> tuple[int, ...]:
        generator = np.random.default_rng((plan.seed, zlib.crc32(what.encode())))
        return tuple(generator.choice(vocabulary, tokens).tolist())

    def run(number: int) -> list[list[Request]]:
        prefix = random_tokens(f"prefix {cached}", cached)
        own = random_tokens(f"turn {cached} {new} {number}", new)
        turn = [Request(prefix + own, plan.output_tokens)]
        first = [Request(prefix, 1)] if prefix and not number else []
        return [first + turn]

    longest = cached + new + plan.output_tokens
    return LoadPoint("turns", new, 1, new, longest, run, cached)


def _agent_point(plan: Plan, tokenizer: Any, at_once: int) -> LoadPoint:
    def run(number: int) -> list[list[Request]]:
        mark = f"run {plan.seed}.{at_once}.{number}"
        sessions = plan.sessions if number else plan.sessions[:1]
        return [turns(session, tokenizer, mark) for session in sessions]

    requests = [request for session in run(1) for request in session]
    read = [len(request.prompt) for request in requests]
    longest = max(len(request.prompt) + request.output_tokens for request in requests)
    return LoadPoint("agent", round(sum(read) / len(read)), at_once, sum(read), longest, run)


def plain_tokens(tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens that stand for text, ``[n]``: none that are special or added, such as those of images."""
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return np.array(sorted({*tokenizer.get_vocab().values()} - left_out), dtype=np.int64)
