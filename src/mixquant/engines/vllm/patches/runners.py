"""vLLM's model runners tell their followers of each pass.

vLLM has two: V1 on CPUs and for some models, V2 elsewhere. Both are patched alike.
"""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from mixquant.engines.vllm import graphs
from mixquant.engines.vllm.context import Batch
from mixquant.engines.vllm.follower import Follower
from mixquant.engines.vllm.log import logger
from mixquant.engines.vllm.patches.loading import refuse_kernel_format
from mixquant.engines.vllm.patches.model import patch_model
from mixquant.engines.vllm.patches.outcome import lines_of
from mixquant.engines.vllm.stack import with_room
from mixquant.engines.vllm.table import log_table

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"
_said = False  # that there is neither


def install(method: Any) -> None:
    """Wraps the model runners of this process, which are loading their models as this is called."""
    global _said
    found = False
    for name, prepare, note in ((V1, "_prepare_inputs", note_v1), (V2, "prepare_inputs", note_v2)):
        if (module := sys.modules.get(name)) is not None:
            _wrap(module.GPUModelRunner, prepare, note, type(method))
            found = True
    if not (found or _said):
        logger.warning(
            "the model is loaded without a model runner that mixquant knows (%s or %s): nothing will be "
            "quantized; please report this with vLLM's version, or take preset exact",
            V1,
            V2,
        )
        _said = True


def _wrap(runner_class: Any, prepare: str, note: Any, config_class: type) -> None:
    if getattr(runner_class, "mixquant_follows", False):
        return
    runner_class.mixquant_follows = True
    preparing = getattr(runner_class, prepare)
    executing = runner_class.execute_model
    profiling = runner_class.profile_run

    @functools.wraps(preparing)
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = preparing(self, scheduler_output, *args, **kwargs)
        if (follower := _follower(self, config_class)) is not None:
            noted = note(self, scheduler_output, prepared)
            first = follower.first_prompts.of(noted.requests, noted.prompt_lengths)
            follower.note(replace(noted, prompt_lengths=first))
        return prepared

    @functools.wraps(executing)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        follower = _follower(self, config_class)
        if follower is None:
            return executing(self, *args, **kwargs)
        step = args[0] if args else kwargs["scheduler_output"]
        follower.first_prompts.follow(step)
        is_dummy = kwargs.get("dummy_run", args[2] if len(args) > 2 else False)
        follower.begin_step()
        try:
            return with_room(executing, self, *args, **kwargs)
        finally:
            follower.end_step(0 if is_dummy else step.total_num_scheduled_tokens)

    @functools.wraps(profiling)
    def profile_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        follower = _follower(self, config_class)
        if follower is None:
            return profiling(self, *args, **kwargs)
        follower.profiling = True
        try:
            return profiling(self, *args, **kwargs)
        finally:
            follower.profiling = False

    initializing = getattr(runner_class, "initialize_kv_cache", None)
    if initializing is not None:

        @functools.wraps(initializing)
        def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
            follower = _follower(self, config_class)
            planned = None if follower is None else follower.graphs
            with graphs.configured(planned, self.vllm_config.compilation_config):
                return initializing(self, *args, **kwargs)

        runner_class.initialize_kv_cache = initialize_kv_cache

    reloading = getattr(runner_class, "reload_weights", None)
    if reloading is not None:

        @functools.wraps(reloading)
        def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.vllm_config.quant_config, config_class):
                given = inspect.signature(reloading).bind(self, *args, **kwargs).arguments
                refuse_kernel_format(given.get("is_checkpoint_format", True))
            return reloading(self, *args, **kwargs)

        runner_class.reload_weights = reload_weights
    setattr(runner_class, prepare, prepare_inputs)
    runner_class.execute_model = execute_model
    runner_class.profile_run = profile_run


def _follower(runner: Any, config_class: type) -> Follower | None:
    """The runner's follower, watching its present model; None if another method quantizes it."""
    method = runner.vllm_config.quant_config
    if not isinstance(method, config_class):
        return None
    follower: Follower | None = runner.__dict__.get("mixquant_follower")
    first = follower is None
    if follower is None:
        follower = runner.mixquant_follower = Follower(runner, method)
    model = runner.get_model()
    if model is not follower.model:
        patched = patch_model(model, follower.recipe, runner.vllm_config)
        follower.watch(model, patched.fp8_attention)
        if first:
            outcomes = [*patched.outcomes, follower.capture_quantized(runner, model)]
            log_table(model, follower.recipe, lines_of(outcomes))
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
