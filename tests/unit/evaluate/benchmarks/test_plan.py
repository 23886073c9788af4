"""Settings, what prompts are cut to, and which items a limited run asks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import REPOSITORY

from mixquant.checkpoints.errors import ModelError
from mixquant.evaluate.benchmarks.plan import Options, context_of, on_cpu, some_items
from mixquant.evaluate.benchmarks.settings import MiddleCutter, Settings
from mixquant.evaluate.tasks import Item, Task, TaskError
from mixquant.servers.arms import ServedArm


class Long(Task):
    name = "long"
    defaults = {"seeds": 5, "context_tokens": 1000, "temperature": 0.2}  # noqa: RUF012


def test_settings_are_the_users_then_the_benchmarks_then_the_papers() -> None:
    given = {"temperature": None, "top_k": 3, "seeds": 2, "thinking": False}
    chosen = Settings.of(Long(), given, None)
    assert chosen == Settings(0.2, 0.95, 3, 32768, False, 2, 1000)
    assert Settings.of(Task(), {}, None) == Settings(0.6, 0.95, 20, 32768, True, 1, None)


@pytest.mark.parametrize(("context", "answer"), [(None, 100), (101, 100), (100, 50), (1, 1)])
def test_an_answer_that_fills_the_context_is_shortened(context: int | None, answer: int) -> None:
    assert Settings.of(Task(), {"max_tokens": 100}, context).max_tokens == answer


def no_tokenizer() -> Any:
    raise AssertionError("needs no tokenizer")


def test_tasks_that_cut_nothing_need_no_tokenizer() -> None:
    assert MiddleCutter(Settings(), 10, no_tokenizer)("word " * 1000) == "word " * 1000


@pytest.mark.parametrize(
    ("context", "most"), [(None, 1000), (5000, 1000), (1400, 1400 - 200 - 512)]
)
def test_prompts_are_cut_to_the_benchmarks_length_or_what_the_model_leaves(
    context: int | None, most: int, smollm2: tuple[Any, Any]
) -> None:
    _, tokenizer = smollm2
    cut = MiddleCutter(
        Settings.of(Long(), {"max_tokens": 200}, context), context, lambda: tokenizer
    )
    text = "".join(f"{number} Größe 🙂, " for number in range(3000))
    shortened = cut(text)
    tokens = len(tokenizer(shortened)["input_ids"])
    assert most - 60 < tokens <= most
    assert shortened.startswith(text[:100])
    assert shortened.endswith(text[-100:])
    assert cut(text[:500]) == text[:500]


def test_whole_prompts_need_nothing_around_them(smollm2: tuple[Any, Any]) -> None:
    settings = Settings.of(Long(), {"max_tokens": 200}, 1400)
    text = "word " * 3000
    kept = [
        len(
            smollm2[1](MiddleCutter(settings, 1300, lambda: smollm2[1], **around)(text))[
                "input_ids"
            ]
        )
        for around in ({}, {"around": 0})
    ]
    assert kept[1] - kept[0] >= 400
    assert kept[1] <= 1000


def test_a_model_with_no_room_for_a_prompt_is_refused(smollm2: tuple[Any, Any]) -> None:
    cut = MiddleCutter(Settings.of(Long(), {"max_tokens": 200}, 600), 600, lambda: smollm2[1])
    with pytest.raises(TaskError, match="no room for a prompt beside an answer of 200"):
        cut("text")


def test_a_model_without_chat_template_is_refused() -> None:
    class Plain:
        chat_template = None

    with pytest.raises(ModelError, match="no chat template"):
        MiddleCutter(Settings.of(Long(), {}, 99999), 99999, Plain)("text")


@pytest.mark.parametrize(
    ("given", "context", "added"),
    [
        ("", 100, "--no-enable-chunked-prefill --max-num-batched-tokens 100 --max-model-len 100"),
        ("--max_model_len=99", 99, "--no-enable-chunked-prefill --max-num-batched-tokens 99"),
        ("--max-num-batched-tokens 7", 100, ""),
        ("", None, ""),
    ],
)
def test_on_a_cpu_prompts_are_read_in_one_chunk(
    given: str, context: int | None, added: str
) -> None:
    arm = ServedArm("bf16", arguments=tuple(given.split()))
    assert " ".join(on_cpu(arm, context).arguments) == f"{given} {added}".strip()
    running = ServedArm("bf16", url="http://x")
    assert on_cpu(running, context) == running


def test_a_length_that_vllm_is_given_counts_more_than_the_checkpoints(smollm2_path: str) -> None:
    def context(*arguments: str, limit: int | None = None) -> int | None:
        arms = [ServedArm("bf16", arguments=arguments), ServedArm("mixquant", arguments=arguments)]
        return context_of(Options(smollm2_path, [], arms, Path(), context=limit))

    assert context() == 8192
    assert context("--max-model-len", "4096") == 4096
    assert context("--max-model-len=32768", "--hf-overrides", "{}") == 32768
    assert context("--max-model-len=32768", limit=1000) == 1000


@pytest.mark.slow
def test_the_guides_arguments_for_yarn_are_vllms(tmp_path: Path) -> None:
    config = pytest.importorskip("vllm.config")
    page = (REPOSITORY / "docs" / "guide" / "benchmarks.md").read_text()
    (given,) = re.findall(r"--hf-overrides '(.*)'$", page, re.MULTILINE)
    (quoted,) = re.findall(r"^ +'(--max-model-len .*--hf-overrides .*)'$", page, re.MULTILINE)
    assert json.loads(shlex.split(quoted)[-1]) == json.loads(given)
    shape = {  # of Qwen3-8B
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    made = config.ModelConfig(
        model=str(tmp_path),
        hf_overrides=json.loads(given),
        max_model_len=131072,
        skip_tokenizer_init=True,
    )
    assert made.max_model_len == 131072
    assert made.hf_config.rope_parameters["rope_type"] == "yarn"


ITEMS = st.lists(st.sampled_from("abc"), min_size=1, max_size=40).map(
    lambda groups: [Item(str(n), (), None, group=group) for n, group in enumerate(groups)]
)


@settings(deadline=None)
@given(ITEMS, st.integers(1, 45), st.integers(0, 10), st.booleans())
def test_a_limited_run_can_be_enlarged(
    items: list[Item], limit: int, more: int, in_turns: bool
) -> None:
    some = some_items(items, limit, in_turns=in_turns)
    assert len(some) == min(limit, len(items))
    assert [item for item in items if item in some] == list(some)
    enlarged = some_items(items, limit + more, in_turns=in_turns)
    assert {item.id for item in some} <= {item.id for item in enlarged}
    assert some == some_items(items, limit, in_turns=in_turns)


@settings(deadline=None)
@given(ITEMS, st.integers(1, 45))
def test_in_turns_no_group_is_left_out_before_its_turn(items: list[Item], limit: int) -> None:
    drawn = [item.group for item in some_items(items, limit, in_turns=True)]
    for group in {item.group for item in items}:
        left = [item for item in items if item.group == group]
        fewest = min(len(left), max(map(drawn.count, set(drawn))) - 1)
        assert drawn.count(group) >= fewest
