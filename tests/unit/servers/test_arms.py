"""Arms: from options to what is compared, and servers that run already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_stub import Stub, serving

from mixquant import Recipe
from mixquant.servers.arms import (
    DEFAULTS,
    ArmError,
    ServedArm,
    chosen_arms,
    served_models,
    served_name,
)

RECIPE = Recipe(format="int8", min_prefill_tokens=7)


def test_the_default_arms_differ_in_their_recipes_alone() -> None:
    bf16, quantized, mixquant = chosen_arms(RECIPE, vllm_args="--max-model-len 100 --x 'a b'")
    shared = ("--max-model-len", "100", "--x", "a b")
    assert bf16 == ServedArm("bf16", None, shared)
    assert quantized == ServedArm("quantized", replace(RECIPE, everywhere=True), shared)
    assert mixquant == ServedArm("mixquant", RECIPE, shared)


def test_chosen_arms_stand_in_their_usual_order() -> None:
    arms = chosen_arms(
        RECIPE,
        ["mine=--quantization fp8", "mixquant", "bf16"],
        ["quantized=http://one:8000/v1/", "other=https://two/x"],
        "--seed 1",
    )
    assert [arm.name for arm in arms] == [*DEFAULTS, "other", "mine"]
    assert arms[1] == ServedArm("quantized", url="http://one:8000")
    assert arms[3].url == "https://two/x"
    assert arms[4] == ServedArm("mine", arguments=("--seed", "1", "--quantization", "fp8"))


def test_addresses_alone_start_nothing() -> None:
    assert chosen_arms(RECIPE, urls=["a=http://x"]) == (ServedArm("a", url="http://x"),)


@pytest.mark.parametrize(
    ("arms", "urls", "says"),
    [
        (["fast"], [], "unknown arm 'fast'; expected bf16, quantized, mixquant"),
        (["../x=--y"], [], "an arm's name is"),
        (["=--y"], [], "an arm's name is"),
        (["a='"], [], "--arm a: cannot read"),
        (["bf16", "bf16"], [], "two arms are called 'bf16'"),
        (["bf16"], ["bf16=http://x"], "two arms are called 'bf16'"),
        ([], ["http://x"], "expected NAME=URL"),
        ([], ["a=x:8000"], "expected NAME=URL with http:// or https://"),
    ],
)
def test_options_that_cannot_be_read(arms: list[str], urls: list[str], says: str) -> None:
    with pytest.raises(ArmError) as caught:
        chosen_arms(RECIPE, arms, urls)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vllm_args": "--quantization fp8"}, "--vllm-args: '--quantization' is --quantization"),
        ({"vllm_args": "--quantiz=fp8"}, "--vllm-args: '--quantiz=fp8' is --quantization"),
        ({"vllm_args": "--seed 1 -qfp8"}, "--vllm-args: '-qfp8' is -q"),
        ({"vllm_args": "--additional-config.mixquant.preset exact"}, "is --additional-config"),
        ({"vllm_args": "--port=3"}, "is --port, which this command sets"),
        ({"arms": ["mine=--served x"]}, "--arm mine: '--served' is --served-model-name"),
        ({"arms": ["mine=--config file.yaml"]}, "--arm mine: '--config' is --config"),
    ],
)
def test_arguments_that_would_undo_an_arm_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ArmError) as caught:
        chosen_arms(RECIPE, **given)
    assert says in str(caught.value)


def test_results_say_what_an_arm_was() -> None:
    started, found = chosen_arms(RECIPE, ["mixquant"], ["found=http://x"], "--x 'a b'")
    assert started.to_result().arguments == "--x 'a b'"
    assert started.to_result().recipe == RECIPE.to_dict()
    assert (found.to_result().url, found.to_result().arguments) == ("http://x", None)


def test_what_a_server_serves() -> None:
    with serving(Stub(lambda body: "", {"one": 4096, "two": None}, key="k")) as stub:
        served = served_models(stub.url, "k")
        assert served == {"one": 4096, "two": None}
        assert served_name(served, "one", stub.url) == "one"
        with pytest.raises(ArmError, match="does not serve 'three' but 'one', 'two'"):
            served_name(served, "three", stub.url)
        with pytest.raises(ArmError, match=r"answers 401 .*another key"):
            served_models(stub.url)
        with pytest.raises(ArmError, match=r"no server answers at http://127\.0\.0\.1:9: "):
            served_models("http://127.0.0.1:9")
