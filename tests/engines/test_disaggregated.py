"""A prefill and a decode engine with the KV cache sent between them: what each computes, and with what.

Real engines on the CPU, NIXL between them. The reference is one engine that does both phases, under
the settings with which it quantizes the same rows: no threshold and no prefix cache.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import this_machine
from real_model import layers_of
from transformers import AutoTokenizer
from vllm_engines import (
    ON_GPU,
    divergence,
    mixquant,
    quantized_positions,
    require_vllm,
    results_of,
    rows_of,
)

from mixquant.checkpoints.write import quantize

require_vllm()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
    this_machine.needs_patience,
]

# Some end within a block of the KV cache, some with one; the shortest is less than a block.
LENGTHS = (300, 37, 128, 256)
NEW = 8
# As in the tests of one engine: the shapes of passes differ, and with them the order of sums.
SAME = 0.1
NIXL = {"kv_connector": "NixlConnector", "kv_buffer_device": "cuda" if ON_GPU else "cpu"}


@pytest.fixture(scope="module")
def prompts(smollm2_path: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    text = tokenizer("\n".join(topics.values())[:30_000])["input_ids"]
    return [text[1000 * n : 1000 * n + count] for n, count in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def second_checkpoint(model: str, tmp_path_factory: pytest.TempPathFactory) -> str | None:
    if importlib.util.find_spec("llmcompressor") is None:
        return None
    return str(quantize(model, tmp_path_factory.mktemp("second") / "fp8", "fp8", samples=2))


@pytest.fixture(scope="module")
def engines(
    model: str,
    prompts: list[list[int]],
    second_checkpoint: str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    base = {"max_model_len": 1024, "enable_prefix_caching": False}
    everything = {"prompts": prompts, "new_tokens": NEW}
    few = {"prompts": prompts[:2], "new_tokens": 2}

    def engine(runs: dict[str, Any], **recipe: Any) -> dict[str, Any]:
        options = {**base, **mixquant(min_prefill_tokens=0, **recipe)}
        return {"model": model, "options": options, "runs": runs}

    def a_set(runs: dict[str, Any], **recipe: Any) -> dict[str, Any]:
        def role(name: str, kv_role: str) -> dict[str, Any]:
            transfer = {**NIXL, "kv_role": kv_role}
            return {**base, "kv_transfer_config": transfer, **mixquant(role=name, **recipe)}

        return {
            "model": model,
            "options": role("decode", "kv_consumer"),
            "prefill": role("prefill", "kv_producer"),
            "runs": runs,
        }

    spec = {
        "colocated": engine({"all": everything}),
        "set": a_set(
            {"all": everything, "by itself": {**everything, "new_tokens": 1, "sent": False}}
        ),
    }
    if second_checkpoint is not None:
        recipe = {"prefill_model": second_checkpoint, "emulate": True}
        spec["colocated, second checkpoint"] = engine({"all": few}, **recipe)
        spec["set, second checkpoint"] = a_set({"all": few}, **recipe)
    return results_of(spec, tmp_path_factory.mktemp("engines"))


def linear_layers(model: str) -> int:
    return 4 * layers_of(model)  # qkv, o, gate and up, down


def a_set_of(engines: dict[str, Any], name: str) -> dict[str, Any]:
    if (found := engines.get(name)) is None:
        pytest.skip("llm-compressor is not installed")
    return dict(found)


SETS = ("set", "set, second checkpoint")


@pytest.mark.parametrize("name", SETS)
def test_the_prefill_engine_quantizes_every_row(
    engines: dict[str, Any], name: str, model: str
) -> None:
    run = a_set_of(engines, name)["all, prefill"]
    for request in range(len(run["tokens"])):
        assert quantized_positions(run, request) == list(range(LENGTHS[request]))
    assert all(row[3] for one in run["passes"] for row in rows_of(one))
    assert run["products"]["linear"] == linear_layers(model) * len(run["passes"])


@pytest.mark.parametrize("name", SETS)
def test_the_decode_engine_computes_the_last_token_of_a_prompt_and_what_follows_in_bf16(
    engines: dict[str, Any], name: str
) -> None:
    """So the first token of an answer comes from BF16 weights, over keys and values that were sent."""
    run = a_set_of(engines, name)["all"]
    computed: dict[int, list[int]] = {request: [] for request in range(len(run["tokens"]))}
    for one in run["passes"]:
        for request, position, _, quantized in rows_of(one):
            assert not quantized
            computed[request].append(position)
    for request, positions in computed.items():
        prompt = LENGTHS[request]
        new = len(run["tokens"][request])
        assert positions == list(range(prompt - 1, prompt + new - 1))
    assert not run["products"]


@pytest.mark.parametrize("suffix", ["", ", second checkpoint"])
def test_a_set_answers_as_one_engine_does(engines: dict[str, Any], suffix: str) -> None:
    ours = a_set_of(engines, f"set{suffix}")["all"]
    bf16, colocated = engines["set"]["by itself"], engines[f"colocated{suffix}"]["all"]
    requests = range(len(ours["tokens"]))
    effect = sum(divergence(bf16, n, colocated, n) for n in requests)
    assert effect > 1e-3  # or this would hold for BF16 as well
    assert sum(divergence(colocated, n, ours, n) for n in requests) < SAME * effect


def test_so_do_all_later_tokens(engines: dict[str, Any]) -> None:
    """As far as both say the same; each place of an answer stands on those before it."""
    ours, colocated = engines["set"]["all"], engines["colocated"]["all"]
    for request in range(len(LENGTHS)):
        for place in range(NEW):
            p, q = (run["logprobs"][request][place] for run in (ours, colocated))
            likeliest = max(q, key=q.__getitem__)
            assert abs(p[likeliest] - q[likeliest]) < 0.1, (request, place)
            if ours["tokens"][request][place] != colocated["tokens"][request][place]:
                break


def test_the_first_token_is_not_the_prefill_engines(engines: dict[str, Any]) -> None:
    """It makes one, from quantized weights, which nobody reads."""
    ours, its = engines["set"]["all"], engines["set"]["all, prefill"]
    colocated = engines["colocated"]["all"]
    requests = range(len(LENGTHS))
    near = sum(divergence(colocated, n, ours, n) for n in requests)
    assert near < SAME * sum(divergence(colocated, n, its, n) for n in requests)


def test_what_nobody_sends_the_decode_engine_reads_itself_in_bf16(engines: dict[str, Any]) -> None:
    run = engines["set"]["by itself"]
    rows = [row for one in run["passes"] for row in rows_of(one)]
    assert not any(quantized for *_, quantized in rows)
    read = {(request, position) for request, position, prompt, _ in rows if position < prompt}
    assert len(read) == sum(LENGTHS)
    assert not run["products"]


def test_bf16_weights_are_never_all_there(engines: dict[str, Any], model: str) -> None:
    """Of quantized layers: while a prefill engine loads, no more than one at a time."""
    colocated, prefill = engines["colocated"]["all"], engines["set"]["all, prefill"]
    assert colocated["most_layers_in_bf16"] == linear_layers(model)
    assert prefill["most_layers_in_bf16"] == 1
    config = json.loads((Path(model) / "config.json").read_text())
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]
    norms = 2 * (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    assert prefill["parameter_bytes"] == embeddings + norms
