"""The same measurements without a server: one request at a time, on Transformers, in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from mixquant.bench.counts import Counts
from mixquant.bench.generator import Answer
from mixquant.bench.run import Progress
from mixquant.bench.summary import measurements
from mixquant.bench.trace import Request
from mixquant.bench.workloads import LoadPoint
from mixquant.checkpoints.models import Checkpoint, load_model
from mixquant.engines.transformers import phase, prepare
from mixquant.engines.transformers.counting import quantized_rows
from mixquant.results import Measurement
from mixquant.servers.arms import ServedArm


def run(
    arms: Sequence[ServedArm],
    checkpoint: Checkpoint,
    points: Sequence[LoadPoint],
    repeats: int,
    progress: Progress = lambda doing, share: None,
) -> Iterator[tuple[ServedArm, list[Measurement]]]:
    """Measures one arm after the other, with one model in memory at a time. All are loaded in BF16.

    Args:
        points: of one request a run.

    Yields:
        Each arm when all its points are measured.

    Raises:
        ModelError: the model cannot be loaded.
        PrepareError, RecipeError: it cannot be prepared so.
    """
    work = sum(point.prompt_tokens * (repeats + 1) for point in points)
    for number, arm in enumerate(arms):
        progress(f"{arm.name}: loading", number / len(arms))
        model = load_model(checkpoint, torch.bfloat16)
        if arm.recipe is not None:
            prepare(model, arm.recipe)
        found: list[Measurement] = []
        tokens = 0
        for point in points:
            runs, rows = [], [0, 0]
            for turn in range(repeats + 1):
                share = (number + tokens / work) / len(arms)
                progress(f"{arm.name}: {point.name}, run {turn} of {repeats}", share)
                ((request,),) = point.run(turn)
                with quantized_rows(model) as quantized:
                    answer = _answer(model, request)
                tokens += point.prompt_tokens
                if turn:
                    runs.append([answer])
                    rows[0] += quantized[0]  # the prompt's pass
                    rows[1] += len(request.prompt) - quantized[0]
            counts = Counts(*map(float, rows)) if arm.recipe is not None else Counts()
            found += measurements(arm.name, point, runs, counts)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield arm, found


@torch.no_grad()
def _answer(model: Any, request: Request) -> Answer:
    """Reads a prompt in one pass and writes greedily, to the length asked for."""
    ids = torch.tensor([request.prompt], device=model.device)
    times = [_now(model)]
    cache = None
    for step in range(request.output_tokens):
        # A pass of one token could be prefill or decode.
        with phase("decode" if step else "prefill"):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
        times.append(_now(model))
    gaps = [after - before for before, after in pairwise(times)]
    return Answer(len(request.prompt), request.output_tokens, times[0], gaps[0], tuple(gaps[1:]))


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
