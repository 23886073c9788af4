"""The pass that a model runner is in: its plan, in force while the model's forward runs.

Where a runner prepares the inputs of a real pass, the sequences in it are noted; when the model's
forward begins, the note becomes the plan in force; when it ends, the plan ends with it. So drafters,
which run later in the same step, and vision towers, which run before, never see it, and neither do
dummy passes, which are not prepared.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.core.recipe import LEAST_WITHOUT_GRAPHS
from mixquant.engines.vllm import graphs, hardware
from mixquant.engines.vllm.attention.layers import PrefillAttention
from mixquant.engines.vllm.context import Batch, state_of
from mixquant.engines.vllm.counters import Counters, multiprocess
from mixquant.engines.vllm.first_prompts import FirstPrompts
from mixquant.engines.vllm.log import logger
from mixquant.engines.vllm.patches.outcome import Outcome

TRACE = "MIXQUANT_TRACE"
"""Environment variable: a file to which every pass is appended as a line of JSON."""


class Follower:
    """What is known of one model runner's pass while it goes through."""

    def __init__(self, runner: Any, method: Any) -> None:
        recipe = self.recipe = method.recipe
        self.thresholds = Thresholds(
            min_prefill_tokens=recipe.min_prefill_tokens or 0,
            precise_head=recipe.precise_head or 0,
            precise_tail=recipe.precise_tail,
        )
        self._precise = True  # until a model is watched in which something is quantized
        self._everywhere = False
        self.model: Any = None
        self.noted: Batch | None = None
        self._ever_noted = False
        self._ran_unnoted = False
        self.first_prompts = FirstPrompts()
        self.profiling = False
        self._fp8_attention: PrefillAttention | None = None
        self.graphs: graphs.QuantizedGraphs | None = None
        self._workspace: Any = None
        self._longest = runner.vllm_config.model_config.max_model_len
        self._entered: in_force | None = None
        self._counters = _counters_of(runner, method)
        self._trace = os.environ.get(TRACE) if self._counters is not None else None

    def capture_quantized(self, runner: Any, model: Any) -> Outcome:
        """Decides which quantized CUDA graphs the runner captures, if the model can have them.

        Without them, short passes gain nothing, and the threshold is higher by default.
        """
        self.graphs, outcome = graphs.prepare(
            runner, model, self.recipe, self.thresholds.min_prefill_tokens
        )
        by_default = runner.vllm_config.quant_config.default_threshold
        if self.graphs is None and by_default and hardware.is_gpu():
            self.recipe = replace(self.recipe, min_prefill_tokens=LEAST_WITHOUT_GRAPHS)
            self.thresholds = replace(self.thresholds, min_prefill_tokens=LEAST_WITHOUT_GRAPHS)
        return outcome

    def watch(self, model: Any, fp8_attention: PrefillAttention | None) -> None:
        """Puts the hooks on the model, which may have been loaded anew.

        Args:
            fp8_attention: the largest of its layers that attend in FP8.
        """
        self.model = model
        self._fp8_attention = fp8_attention
        # What was made counts, not what the recipe asked for.
        self._precise = fp8_attention is None and not any(map(_holds_a_copy, model.modules()))
        # A prefill engine has no BF16 weights with which a row could be precise.
        everywhere = self.recipe.everywhere or self.recipe.role == "prefill"
        self._everywhere = everywhere and not self._precise
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def begin_step(self) -> None:
        """The runner's step begins: dummy passes before it say nothing of it."""
        self._ran_unnoted = False

    def note(self, batch: Batch) -> None:
        """The runner has prepared the inputs of a real pass, with these sequences."""
        self.noted = batch
        self._ever_noted = True

    def end_step(self, tokens: int) -> None:
        """The runner's step is over: a pass that was noted but never ran was a graph's replay.

        Args:
            tokens: that the scheduler asked for; 0 in a dummy run.
        """
        if self.noted is not None:
            rows = int(self.noted.row_counts.sum())
            everything = everything_quantized(rows) if self._everywhere else None
            self._count(self.noted, everything, "graph")
            self.noted = None
        if tokens and self._ran_unnoted and not (self._ever_noted or self._everywhere):
            logger.warning(
                "vLLM ran a pass of %d tokens and did not tell mixquant which prompts are in it; such "
                "passes are neither quantized nor counted; please report this with vLLM's version",
                tokens,
            )
            self._ever_noted = True  # said once

    def _begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        batch, self.noted = self.noted, None
        self._ran_unnoted = batch is None
        rows = _row_count(args, kwargs)
        plan = None
        if self._everywhere:
            plan = everything_quantized(rows)  # dummy passes, too: graphs are captured from them
            if batch is not None:
                state_of(plan).batch = batch
                counted = everything_quantized(int(batch.row_counts.sum()))  # no padding
                self._count(batch, counted, "graph" if _may_replay_graph() else None)
        elif self.profiling:
            plan = plan_pass(Thresholds(), [0], [rows], [rows])  # what the largest pass may be
        elif batch is not None:
            plan = self._plan_of_real_pass(batch, rows)
        elif self.graphs is not None and self.graphs.holds(rows) and not _captures():
            plan = self.graphs.plan_to_capture(rows)
        if self.profiling and self._fp8_attention is not None:
            # vLLM leaves attention out as it measures what memory a pass may need.
            self._workspace = self._fp8_attention.workspace(
                rows, self._longest, torch.device("cuda")
            )
        self._entered = in_force(plan)
        self._entered.__enter__()

    def _end(self, model: Any, args: Any, output: Any) -> None:
        self._workspace = None
        if self._entered is not None:
            self._entered.__exit__()
            self._entered = None

    def _plan_of_real_pass(self, batch: Batch, rows: int) -> PhasePlan | None:
        kind = "graph" if _may_replay_graph() else None
        quantized_graph = kind and self.graphs is not None and self.graphs.holds(rows)
        plan = self._plan(batch, rows, bool(kind and not quantized_graph))
        if plan is not None:
            state_of(plan).batch = batch
        if quantized_graph:
            assert self.graphs is not None
            kind = "quantized_graph" if self.graphs.serve(plan) else None
            if kind is None:
                graphs.leave()
        self._count(batch, plan, kind)
        return plan

    def _plan(self, batch: Batch, rows: int, may_replay_graph: bool) -> PhasePlan | None:
        padding = rows - int(batch.row_counts.sum())
        if self._precise or padding < 0 or not (batch.first_positions < batch.prompt_lengths).any():
            return None
        return plan_pass(
            self.thresholds,
            np.append(batch.first_positions, -padding),
            np.append(batch.row_counts, padding),
            np.append(batch.prompt_lengths, 0),
            may_replay_graph=may_replay_graph,
        )

    def _count(self, batch: Batch, plan: PhasePlan | None, kind: str | None) -> None:
        if self._counters is None:
            return
        total = int(batch.row_counts.sum())
        left = batch.prompt_lengths - batch.first_positions
        # Nearly all passes are decode steps.
        prefill = int(left.clip(0, batch.row_counts).sum()) if (left > 0).any() else 0
        quantized = plan.quantized_rows if plan is not None else 0
        kind = kind or ("quantized" if quantized else "precise")
        of_prefill = min(quantized, prefill)
        of_decode = quantized - of_prefill  # none, unless everything is quantized
        rows = (of_prefill, prefill - of_prefill, of_decode, total - prefill - of_decode)
        self._counters.add(rows, kind)
        if self._trace:
            line = {
                "kind": kind,
                "requests": batch.requests,
                "first_positions": batch.first_positions.tolist(),
                "row_counts": batch.row_counts.tolist(),
                "prompt_lengths": batch.prompt_lengths.tolist(),
                "quantized": plan.quantized if plan is not None else (),
            }
            with open(self._trace, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _holds_a_copy(module: Any) -> bool:
    """Whether a layer multiplies quantized rows with a copy of its own: a linear one, or experts."""
    experts = getattr(getattr(module, "quant_method", None), "quantized", None)
    return getattr(module, "mixquant_method", None) is not None or experts is not None


def _row_count(args: Any, kwargs: dict[str, Any]) -> int:
    positions = kwargs.get("positions")
    if positions is None:
        positions = next(arg for arg in args if arg is not None)
    return int(positions.shape[-1])  # [rows], or [3, rows] for M-RoPE


def _captures() -> bool:
    """Whether a CUDA graph of a whole pass is captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _may_replay_graph() -> bool:
    """Whether this pass runs in, or is captured into, a CUDA graph."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if _captures():
        return True
    if not is_forward_context_available():
        return False
    return bool(get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.NONE)


def _counters_of(runner: Any, method: Any) -> Counters | None:
    """The counters, in the one worker of each engine that counts; None in the others."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() != 0 or not get_pp_group().is_first_rank:
        return None
    if method.counters is None and multiprocess():
        return Counters(None)
    if method.counters is None or not os.path.exists(method.counters):
        return None
    # Not data_parallel_rank, which is 0 in all ranks of a dense model.
    return Counters(method.counters, runner.vllm_config.parallel_config.data_parallel_index)
