"""Follows vLLM's model runners: which rows each forward pass holds, and the plan while it runs.

vLLM has two model runners (V1 on CPUs and for some models, V2 elsewhere). Both are followed alike:
where a runner prepares the inputs of a real pass, the sequences in it are noted; when the model's
forward begins, the note becomes the plan in force; when it ends, the plan ends with it. So drafters,
which run later in the same step, and vision towers, which run before, never see it, and neither do
dummy passes, which are not prepared.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mixquant.core.phase import PhasePlan, Thresholds, everything_quantized, in_force, plan_pass
from mixquant.engines.vllm.attention.layers import PrefillAttention, follow_attention
from mixquant.engines.vllm.beams import FirstPrompts
from mixquant.engines.vllm.counters import Counters, multiprocess
from mixquant.engines.vllm.linear import fp8_layer
from mixquant.engines.vllm.loading.online import follow_loading, refuse_kernel_format
from mixquant.engines.vllm.patches.fusion import follow_activations, follow_norms

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"

TRACE = "MIXQUANT_TRACE"
"""Environment variable: a file to which every pass is appended as a line of JSON."""


@dataclass(frozen=True)
class Batch:
    """The sequences of one pass, in row order; arrays ``[sequences]``, in tokens."""

    requests: list[str]
    first_positions: np.ndarray
    row_counts: np.ndarray
    prompt_lengths: np.ndarray


class Follower:
    """What is known of one model runner's pass while it goes through."""

    def __init__(self, runner: Any, method: Any) -> None:
        recipe = self.recipe = method.recipe
        self.thresholds = Thresholds(
            min_prefill_tokens=recipe.min_prefill_tokens,
            precise_head=recipe.precise_head or 0,
            precise_tail=recipe.precise_tail,
        )
        self._precise = True  # until a model is watched in which something is quantized
        self._everywhere = False
        self.model: Any = None
        self.noted: Batch | None = None
        self.first_prompts = FirstPrompts()
        self.profiling = False
        self.attention = ""
        self._fp8_attention: PrefillAttention | None = None
        self._room: Any = None
        self._longest = runner.vllm_config.model_config.max_model_len
        self._with_lora = runner.vllm_config.lora_config is not None
        self._ranks = runner.vllm_config.parallel_config.tensor_parallel_size
        self._entered: in_force | None = None
        self._counters = _counters_of(runner, method)
        self._trace = os.environ.get(TRACE) if self._counters is not None else None

    def watch(self, model: Any) -> None:
        """Puts the hooks on the model, which may have been loaded anew."""
        if model is not self.model:
            self.model = model
            self.attention, self._fp8_attention = follow_attention(model, self.recipe)
            if self._fp8_attention is not None:
                self._fp8_attention.warm_up(torch.device("cuda"))
            follow_activations(model, self._with_lora)
            follow_norms(model, self._with_lora, self._ranks)
            methods = [getattr(module, "mixquant_method", None) for module in model.modules()]
            layers = [getattr(method, "fp8", None) for method in methods]
            # What was made counts, not what the recipe asked for.
            self._precise = self._fp8_attention is None and not any(
                map(_holds_a_copy, model.modules())
            )
            # A prefill engine has no BF16 weights with which a row could be precise.
            everywhere = self.recipe.everywhere or self.recipe.role == "prefill"
            self._everywhere = everywhere and not self._precise
            fp8_layer.warm_up([one for one in layers if one is not None], torch.device("cuda"))
            follow_loading(model)
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, always_call=True)

    def finish(self) -> None:
        """The runner's step is over: a pass that was noted but never ran was a graph's replay."""
        if self.noted is not None:
            rows = int(self.noted.row_counts.sum())
            everything = everything_quantized(rows) if self._everywhere else None
            self._count(self.noted, everything, "graph")
            self.noted = None

    def _begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        batch, self.noted = self.noted, None
        rows = _row_count(args, kwargs)
        plan = None
        if self._everywhere:
            plan = everything_quantized(rows)  # dummy passes, too: graphs are captured from them
            if batch is not None:
                plan.memo["batch"] = batch
                counted = everything_quantized(int(batch.row_counts.sum()))  # no padding
                self._count(batch, counted, "graph" if _may_replay_graph() else None)
        elif self.profiling:
            plan = plan_pass(Thresholds(), [0], [rows], [rows])  # what the largest pass may be
        elif batch is not None:
            replays = _may_replay_graph()
            plan = self._plan(batch, rows, replays)
            if plan is not None:
                plan.memo["batch"] = batch
            self._count(batch, plan, "graph" if replays else None)
        if self.profiling and self._fp8_attention is not None:
            # vLLM leaves attention out as it measures what memory a pass may need.
            self._room = self._fp8_attention.room(rows, self._longest, torch.device("cuda"))
        self._entered = in_force(plan)
        self._entered.__enter__()

    def _end(self, model: Any, args: Any, output: Any) -> None:
        self._room = None
        if self._entered is not None:
            self._entered.__exit__()
            self._entered = None

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
        prompt = np.clip(batch.prompt_lengths - batch.first_positions, 0, batch.row_counts)
        prefill, total = int(prompt.sum()), int(batch.row_counts.sum())
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


def install(method: Any) -> None:
    """Wraps the model runners of this process, which are loading their models as this is called."""
    if (module := sys.modules.get(V1)) is not None:
        _wrap(module.GPUModelRunner, "_prepare_inputs", note_v1, method)
    if (module := sys.modules.get(V2)) is not None:
        _wrap(module.GPUModelRunner, "prepare_inputs", note_v2, method)


def _wrap(runner_class: Any, prepare: str, note: Any, method: Any) -> None:
    if getattr(runner_class, "mixquant_follows", False):
        return
    runner_class.mixquant_follows = True
    preparing = getattr(runner_class, prepare)
    executing = runner_class.execute_model
    profiling = runner_class.profile_run

    @functools.wraps(preparing)
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = preparing(self, scheduler_output, *args, **kwargs)
        if (follower := _follower(self)) is not None:
            noted = note(self, scheduler_output, prepared)
            first = follower.first_prompts.of(noted.requests, noted.prompt_lengths)
            follower.noted = replace(noted, prompt_lengths=first)
        return prepared

    @functools.wraps(executing)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        follower = _follower(self)
        if follower is not None:
            follower.first_prompts.follow(args[0] if args else kwargs["scheduler_output"])
        try:
            return executing(self, *args, **kwargs)
        finally:
            if follower is not None:
                follower.finish()

    @functools.wraps(profiling)
    def profile_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        follower = _follower(self)
        if follower is None:
            return profiling(self, *args, **kwargs)
        follower.profiling = True
        try:
            return profiling(self, *args, **kwargs)
        finally:
            follower.profiling = False

    reloading = getattr(runner_class, "reload_weights", None)
    if reloading is not None:

        @functools.wraps(reloading)
        def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_ours(self):
                given = inspect.signature(reloading).bind(self, *args, **kwargs).arguments
                refuse_kernel_format(given.get("is_checkpoint_format", True))
            return reloading(self, *args, **kwargs)

        runner_class.reload_weights = reload_weights
    setattr(runner_class, prepare, prepare_inputs)
    runner_class.execute_model = execute_model
    runner_class.profile_run = profile_run


def _is_ours(runner: Any) -> bool:
    from mixquant.engines.vllm.config import MixQuantConfig

    return isinstance(runner.vllm_config.quant_config, MixQuantConfig)


def _follower(runner: Any) -> Follower | None:
    """The runner's follower, watching its present model; None if another method quantizes it."""
    if not _is_ours(runner):
        return None
    method = runner.vllm_config.quant_config
    follower: Follower | None = runner.__dict__.get("mixquant_follower")
    if follower is None:
        follower = runner.mixquant_follower = Follower(runner, method)
        follower.watch(runner.get_model())
        from mixquant.engines.vllm.table import log_table

        log_table(runner.get_model(), follower.recipe, follower.attention)
    follower.watch(runner.get_model())
    return follower


def note_v1(runner: Any, scheduler_output: Any, prepared: Any) -> Batch:
    """The sequences of the pass that a V1 runner's ``_prepare_inputs`` has prepared."""
    batch = runner.input_batch
    count = batch.num_reqs
    requests = list(batch.req_ids[:count])
    scheduled = scheduler_output.num_scheduled_tokens
    return Batch(
        requests,
        batch.num_computed_tokens_cpu[:count].astype(np.int64),
        np.array([scheduled[request] for request in requests], dtype=np.int64),
        batch.num_prompt_tokens[:count].astype(np.int64),
    )


def note_v2(runner: Any, scheduler_output: Any, prepared: Any) -> Batch:
    """The sequences of the pass that a V2 runner's ``prepare_inputs`` has prepared."""
    count = prepared.num_reqs
    # prefill_len would not do: after a preemption it includes generated tokens.
    prompts = runner.req_states.prompt_len.np[prepared.idx_mapping_np[:count]]
    return Batch(
        list(prepared.req_ids[:count]),
        prepared.num_computed_tokens_np[:count].astype(np.int64),
        prepared.num_scheduled_tokens[:count].astype(np.int64),
        prompts.astype(np.int64),
    )


def _holds_a_copy(module: Any) -> bool:
    """Whether a layer multiplies quantized rows with a copy of its own: a linear one, or experts."""
    experts = getattr(getattr(module, "quant_method", None), "quantized", None)
    return getattr(module, "mixquant_method", None) is not None or experts is not None


def _row_count(args: Any, kwargs: dict[str, Any]) -> int:
    positions = kwargs.get("positions")
    if positions is None:
        positions = next(arg for arg in args if arg is not None)
    return int(positions.shape[-1])  # [rows], or [3, rows] for M-RoPE


def _may_replay_graph() -> bool:
    """Whether this pass runs in, or is captured into, a CUDA graph: the captured one is precise."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
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
