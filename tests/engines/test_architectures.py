"""The plugin in real vLLM engines with tiny random models of several architectures."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest
import this_machine
import tiny_models
import torch
import transformers
from transformers import AutoModelForCausalLM
from vllm_engines import (
    ON_GPU,
    by_the_rule,
    divergence,
    mixquant,
    quantized_positions,
    require_vllm,
    results_of,
    rows_of,
)

require_vllm()
pytestmark = [pytest.mark.slow, this_machine.needs_patience]

# What vLLM's attention kernels on the CPU and CUTLASS's products ask for.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "moe_intermediate_size": 128,
}
# To try some of them on a machine that is lent for minutes: their names, separated by commas.
CHOSEN = os.environ.get("MIXQUANT_TEST_ARCHITECTURES", "").split(",")
LENGTHS = (200, 33, 150, 90)
SHORT = 50  # tokens
RANKS = ("tensor", "pipeline")
WITH_GDN = ("qwen3_next", "qwen3_5")
# vLLM's module of Qwen3.5 imports torchvision, which has no CPU build on the package index. Qwen3-Next
# has the same layers of linear attention.
NO_TORCHVISION = importlib.util.find_spec("torchvision") is None
NAMES: list[Any] = [
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "gemma4",
    "gemma4_moe",
    pytest.param(
        "qwen3_5", marks=pytest.mark.skipif(NO_TORCHVISION, reason="torchvision is not installed")
    ),
]


def _model(name: str) -> Any:
    if name != "qwen3_next":
        changes = dict(SIZES)
        if "gemma4" in name:
            changes["global_head_dim"] = 128
        return tiny_models.build(name, **changes)
    config = transformers.Qwen3NextConfig(
        vocab_size=tiny_models.VOCABULARY,
        num_hidden_layers=4,  # three of linear attention, one of full attention
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **SIZES,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("architectures")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 256, (count,), generator=generator).tolist() for count in LENGTHS]
    base = {"max_model_len": 512, "enable_prefix_caching": False, "enforce_eager": True}
    spec: dict[str, Any] = {}
    other = folder / "qwen3 with other weights"
    tiny_models.build("qwen3", seed=1, **SIZES).save_pretrained(other)
    for arm, options in (("plain", {}), ("ours", mixquant(min_prefill_tokens=0))):
        spec[f"other weights, {arm}"] = {
            "model": str(other),
            "options": {**base, **options},
            "runs": {"together": {"prompts": prompts}},
        }
    for parameter in NAMES:
        name = parameter if isinstance(parameter, str) else str(parameter.values[0])
        if (name == "qwen3_5" and NO_TORCHVISION) or (CHOSEN != [""] and name not in CHOSEN):
            continue
        model = folder / name
        _model(name).save_pretrained(model)
        # On Hopper vLLM would have FlashInfer compile a kernel for linear attention.
        additional = {"gdn_prefill_backend": "triton"} if name in WITH_GDN else {}
        for arm, options in (
            ("plain", {}),
            ("exact", mixquant(preset="exact")),
            ("ours", mixquant(min_prefill_tokens=0)),
        ):
            options = {
                **options,
                "additional_config": {**options.get("additional_config", {}), **additional},
            }
            runs: dict[str, Any] = {
                "together": {"prompts": prompts},
                "chunks of 64": {"prompts": prompts, "chunk": 64},
            }
            if name == "qwen3":
                runs["reloaded"] = {"prompts": prompts, "reload_from": str(other)}
            spec[f"{name}, {arm}"] = {
                "model": str(model),
                "options": {**base, **options},
                "runs": runs,
            }
            if name == "qwen3" and arm != "exact" and not ON_GPU:
                for ranks in RANKS:
                    # One engine for both: a prompt that is worth quantizing, and one that is not.
                    least = mixquant(min_prefill_tokens=SHORT) if arm == "ours" else {}
                    parallel = {f"{ranks}_parallel_size": 2, "distributed_executor_backend": "mp"}
                    if ranks == "pipeline":
                        # They want the warm-up pass, which vLLM leaves out on a CPU if eager.
                        parallel |= {
                            "enforce_eager": False,
                            "compilation_config": {"backend": "eager"},
                        }
                    spec[f"{name}, {arm}, {ranks}"] = {
                        "model": str(model),
                        "options": {**base, **least, **parallel},
                        "runs": {
                            "together": {"prompts": prompts, "new_tokens": 4},
                            "short": {"prompts": [prompts[0][:SHORT]], "new_tokens": 4},
                        },
                    }
    return results_of(spec, folder)


@pytest.mark.parametrize("name", NAMES)
def test_exact_is_vllm_without_the_plugin(engines: dict[str, Any], name: str) -> None:
    for run in ("together", "chunks of 64"):
        plain, exact = engines[f"{name}, plain"][run], engines[f"{name}, exact"][run]
        assert exact["tokens"] == plain["tokens"]
        assert exact["logprobs"] == plain["logprobs"]


@pytest.mark.skipif(ON_GPU, reason="needs two GPUs")
@pytest.mark.parametrize("ranks", RANKS)
def test_on_two_ranks(engines: dict[str, Any], ranks: str) -> None:
    plain, ours = (engines[f"qwen3, {arm}, {ranks}"] for arm in ("plain", "ours"))
    assert not any(one["quantized"] for one in ours["short"]["passes"])
    assert ours["short"]["tokens"] == plain["short"]["tokens"]
    alone = engines["qwen3, ours"]["together"]
    for request, count in enumerate(LENGTHS):
        assert quantized_positions(ours["together"], request) == list(range(count - 1))
        # Tensor parallel, rows are quantized by shards of their columns, so not quite as on one rank.
        assert divergence(alone, request, ours["together"], request) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_rows_follow_the_rule_however_they_are_chunked(engines: dict[str, Any], name: str) -> None:
    for run in ("together", "chunks of 64"):
        result = engines[f"{name}, ours"][run]
        for one in result["passes"]:
            assert [row[3] for row in rows_of(one)] == by_the_rule(one, 0, 0, 1)
        for request, count in enumerate(LENGTHS):
            assert quantized_positions(result, request) == list(range(count - 1))


def test_reloaded_weights_are_quantized_anew(engines: dict[str, Any]) -> None:
    ours, plain = (engines[f"other weights, {arm}"]["together"] for arm in ("ours", "plain"))
    reloaded = engines["qwen3, ours"]["reloaded"]
    for request in range(len(LENGTHS)):
        effect = divergence(plain, request, ours, request)
        assert divergence(ours, request, reloaded, request) < 0.1 * effect
    assert reloaded["products"] == engines["qwen3, ours"]["together"]["products"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_multiplied_what_was_planned(engines: dict[str, Any], name: str) -> None:
    for run in ("together", "chunks of 64"):
        ours = engines[f"{name}, ours"][run]
        planned = sum(bool(one["quantized"]) for one in ours["passes"])
        assert ours["products"]["linear"] >= planned
        assert ours["products"]["linear"] % planned == 0
        # vLLM's experts on the CPU stay BF16.
        mixture = "moe" in name or name == "qwen3_next"
        assert (ours["products"].get("experts", 0) >= planned) == (mixture and ON_GPU)
        assert not engines[f"{name}, exact"][run]["products"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_near_bf16_and_not_the_same(engines: dict[str, Any], name: str) -> None:
    plain, ours = engines[f"{name}, plain"]["together"], engines[f"{name}, ours"]["together"]
    differences = [
        divergence(plain, request, ours, request, apart=math.inf) for request in range(len(LENGTHS))
    ]
    assert any(differences)
    # Random weights of this size amplify what a router or a recurrent state makes of small errors.
    # So one request in four may end far away.
    assert sorted(differences)[len(LENGTHS) // 2] < 1.0
