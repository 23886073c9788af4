"""Arms that write together: the same answer, each position's logits, and each arm's own answer."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from sample_results import comparison
from transformers import LlamaConfig, LlamaForCausalLM

from mixquant.cli.tables.compare import reading, table
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import PrepareError
from mixquant.evaluate.compare import run
from mixquant.evaluate.compare.run import TIMED_STEPS, _write
from mixquant.evaluate.compare.timed_arm import TimedArm

PROMPT = list(range(3, 43))
LIMIT = 12


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _greedy(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIMIT,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens: list[int] = out[0, len(PROMPT) :].tolist()
    return tokens


def _arms() -> list[TimedArm]:
    model = _model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.1)
    return [
        TimedArm(name, one, quantize_all=False)
        for name, one in (("bf16", model), ("same", copy.deepcopy(model)), ("other", other))
    ]


def test_arms_write_the_reference_s_answer_and_their_own() -> None:
    arms = _arms()
    first = [arm.read(PROMPT)[1] for arm in arms]
    answer = _write(arms, first, LIMIT, frozenset(), own=True)
    assert answer == _greedy(arms[0].model)
    assert [arm.own_answer for arm in arms] == [_greedy(arm.model) for arm in arms]
    assert arms[2].own_answer != answer
    for arm in arms:
        ids = torch.tensor([[*PROMPT, *answer[:-1]]])
        with torch.no_grad():
            whole = arm.model(ids).logits[0, len(PROMPT) - 1 :]
        (logits,) = arm.logits
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
        assert len(arm.steps) == TIMED_STEPS


@pytest.mark.parametrize("limit", [1, 2, TIMED_STEPS + 1, LIMIT])
def test_the_last_token_of_an_answer_is_in_no_cache(limit: int) -> None:
    arms = _arms()
    first = [arm.read(PROMPT)[1] for arm in arms]
    answer = _write(arms, first, limit, frozenset(), own=False)
    assert len(answer) == limit
    for arm in arms:
        assert arm.cache.get_seq_length() == len(PROMPT) + limit - 1
        assert len(arm.logits[0]) == limit
        assert len(arm.steps) == min(limit - 1, TIMED_STEPS)


def test_an_answer_ends_with_an_ending_token() -> None:
    arms = _arms()
    whole = _greedy(arms[0].model)
    end = next(i for i, token in enumerate(whole) if i and token not in whole[:i])
    first = [arm.read(PROMPT)[1] for arm in arms]
    assert _write(arms, first, LIMIT, frozenset({whole[end]}), own=False) == whole[: end + 1]


def test_the_table_in_one_sentence() -> None:
    result = comparison().model_copy(update={"native": True})
    sentence = reading(result)
    assert sentence is not None
    bf16, mixquant = (next(a for a in result.arms if a.name == n) for n in ("bf16", "mixquant"))
    gain = mixquant.prefill_tokens_per_s / bf16.prefill_tokens_per_s
    assert sentence.startswith(f"mixquant reads prompts {gain:.2f} times as fast as bf16")
    assert f"{mixquant.kl_mean:.4f}" in sentence
    alone = result.model_copy(update={"arms": (mixquant,)})
    assert reading(alone) is None


def test_an_emulation_shows_no_speed() -> None:
    result = comparison().model_copy(update={"native": False, "threads": 1})
    sentence = reading(result)
    assert sentence is not None and sentence.startswith("mixquant diverges from bf16 by ")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(result))
    printed = " ".join(captured.get().split())
    assert printed.count("x ") == 1 and "1.00x" in printed  # of bf16 itself
    assert ", 1 thread." in printed


def test_no_digit_of_a_slow_machine_is_cut_off_at_80_columns() -> None:
    result = comparison()
    slow = {"prefill_tokens_per_s": 54.2, "ttft_s": 31.26, "tpot_s": 1.5246, "extra_bytes": 2**30}
    arms = tuple(arm.model_copy(update=slow) for arm in result.arms)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(result.model_copy(update={"arms": arms})))
    assert "…" not in captured.get()
    assert captured.get().count(" 1525 ") == captured.get().count(" 1024 ") == len(arms)


@pytest.mark.parametrize(
    ("bf16", "fp32", "chosen"),
    [
        ((9.0, 1.0), (2.0, 2.0), torch.bfloat16),
        ((1.0, 9.0), (2.0, 9.0), torch.bfloat16),
        ((3.0, 3.0), (9.0, 2.0), torch.float32),
    ],
)
def test_one_slow_round_does_not_choose_the_type_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, bf16: Any, fp32: Any, chosen: torch.dtype
) -> None:
    rounds = {torch.bfloat16: iter(bf16), torch.float32: iter(fp32)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "load_model", lambda _, dtype: SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(TimedArm, "warm_up", lambda arm, tokens: None)
    monkeypatch.setattr(TimedArm, "read", lambda arm, _: (next(rounds[arm.model.dtype]), None))
    checkpoint: Any = None
    model, seconds = run._baseline(checkpoint, PROMPT, lambda doing, share: None)
    assert model.dtype == chosen
    assert seconds == {"bfloat16": min(bf16), "float32": min(fp32)}


def test_an_arm_that_does_not_run_here_is_refused_before_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_baseline", lambda *_: (None, {}))
    monkeypatch.setattr(run, "load_model", lambda *_: None)
    monkeypatch.setattr(run, "prepare", lambda *_: None)
    monkeypatch.setattr(run, "attends_faster_in_bf16", lambda _: False)
    checkpoint: Any = SimpleNamespace(context=None)
    workload: Any = SimpleNamespace(prompt_tokens=1, turns=1, prompt=lambda _: PROMPT)
    with pytest.raises(PrepareError, match="ask for one of bf16, quantized, mixquant"):
        run.compare(checkpoint, workload, Recipe(), arms=("attention",))
