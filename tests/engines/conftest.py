"""Engines that several files of tests look at: started once, whichever ask for them."""

from __future__ import annotations

from typing import Any

import pytest
import real_model
from this_machine import ON_GPU
from vllm_engines import mixquant, require_vllm, results_of

from mixquant.core.recipe import LEAST_ON_CPU


@pytest.fixture(scope="session")
def model(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2; on a CPU the first layers of it, for time."""
    if ON_GPU:
        return smollm2_path
    return real_model.first_layers(smollm2_path, tmp_path_factory.mktemp("first_layers"))


@pytest.fixture(scope="session")
def prompts(smollm2_path: str) -> list[list[int]]:
    return real_model.text_prompts(smollm2_path)


def at_the_threshold(prompt: list[int]) -> dict[str, Any]:
    """Prompts that no cache holds, with just as many quantizable rows as it takes, and with one less."""
    other = prompt[::-1]
    return {
        "at the threshold": {"prompts": [other[: LEAST_ON_CPU + 1]], "new_tokens": 1},
        "below it": {"prompts": [other[1 : LEAST_ON_CPU + 1]], "new_tokens": 1},
    }


@pytest.fixture(scope="session")
def basic_engines(
    model: str, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Results of vLLM without the plugin, and of the rule's own settings."""
    require_vllm()
    few = prompts[:3]
    logprobs = {"prompts": few, "sampling": {"prompt_logprobs": 1}, "new_tokens": 1}
    spec = {
        "always": real_model.engine(
            model,
            {
                "alone": {"prompts": prompts[:1]},
                "crowd": {"prompts": prompts},
                **({} if ON_GPU else {"chunks of 64": {"prompts": prompts, "chunk": 64}}),
                "chunks of 256": {"prompts": prompts, "chunk": 256},
                "chunks of 2048": {"prompts": prompts, "chunk": 2048},
                "preempted": {"prompts": few, "preempt_after": 4},
                "prompt logprobs": logprobs,
                "doubled": {"prompts": [prompt * 2 for prompt in few], "new_tokens": 24},
                "reloaded": {"prompts": prompts, "reload_from": model},
            },
            **mixquant(min_prefill_tokens=0),
        ),
        "plain": real_model.engine(
            model, {"all": {"prompts": prompts}, "prompt logprobs": logprobs}
        ),
        "exact": real_model.engine(
            model, {"all": {"prompts": prompts}}, **mixquant(preset="exact")
        ),
        "defaults": real_model.engine(
            model,
            {
                # Without graphs the threshold of a GPU is 2,048 tokens.
                "crowd": {"prompts": prompts, "chunk": 4096 if ON_GPU else 256},
                "again": {"prompts": few},
                **({} if ON_GPU else at_the_threshold(prompts[0])),
            },
            enforce_eager=True,
            **{**mixquant(), "enable_prefix_caching": True},
        ),
        "long head and tail": real_model.engine(
            model,
            {"chunks of 64": {"prompts": few, "chunk": 64}},
            enforce_eager=True,
            **mixquant(min_prefill_tokens=0, precise_head=70, precise_tail=100),
        ),
    }
    return results_of(spec, tmp_path_factory.mktemp("basic_engines"))
