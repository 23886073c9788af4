"""The plugin in real vLLM engines with a real model: which rows are quantized, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
from real_model import LENGTHS, SAME, SAME_ALONE, assert_products_were_planned
from vllm_engines import (
    ON_GPU,
    assert_rows_follow_the_rule,
    divergence,
    quantized_positions,
    require_vllm,
    rows_of,
)

from mixquant.core.recipe import LEAST_ON_CPU, LEAST_ON_GPU, LEAST_WITHOUT_GRAPHS

require_vllm()

# On a GPU chunks of 64 would be replayed from CUDA graphs, which hold precise products.
CHUNKED = (
    ["chunks of 256", "chunks of 2048"] if ON_GPU else [f"chunks of {n}" for n in (64, 256, 2048)]
)


@pytest.fixture(scope="module")
def engines(basic_engines: dict[str, Any]) -> dict[str, Any]:
    return basic_engines


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
        ("defaults", None, 0, 1),
    ],
)
def test_every_row_follows_the_rule(
    engines: dict[str, Any], engine: str, minimum: int | None, head: int, tail: int
) -> None:
    if minimum is None:
        kinds = {one["kind"] for run in engines[engine].values() for one in run["passes"]}
        on_gpu = LEAST_ON_GPU if "quantized_graph" in kinds else LEAST_WITHOUT_GRAPHS
        minimum = on_gpu if ON_GPU else LEAST_ON_CPU
    assert_rows_follow_the_rule(engines[engine], minimum, head, tail)


@pytest.mark.skipif(ON_GPU, reason="a GPU's threshold is longer than these prompts may be")
def test_the_threshold_counts_quantizable_rows(engines: dict[str, Any]) -> None:
    at, below = (engines["defaults"][run] for run in ("at the threshold", "below it"))
    assert quantized_positions(at, 0) == list(range(LEAST_ON_CPU))
    assert quantized_positions(below, 0) == []


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


@pytest.mark.parametrize("engine", ["always", "defaults", "long head and tail"])
def test_every_layer_multiplied_what_was_planned(
    engines: dict[str, Any], engine: str, model: str
) -> None:
    assert_products_were_planned(engines[engine], model)


def test_without_a_recipe_for_it_nothing_is_quantized(engines: dict[str, Any]) -> None:
    for engine in ("plain", "exact"):
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


def test_quantized_rows_change_something(engines: dict[str, Any]) -> None:
    """Or all of the above would hold for a plugin that does nothing."""
    plain = engines["plain"]["all"]
    assert divergence(plain, 0, engines["always"]["crowd"], 0) > 1e-5
