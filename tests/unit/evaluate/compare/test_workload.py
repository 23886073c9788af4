"""The agent's conversation that `mixquant compare` reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from mixquant.evaluate.compare.workload import PROMPT_TOKENS, agent_workload


def test_size(smollm2: tuple[Any, Any]) -> None:
    workload = agent_workload(smollm2[1])
    assert 3000 <= workload.prompt_tokens <= PROMPT_TOKENS
    assert workload.turns == 3


def test_turns_continue_the_chat(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    workload = agent_workload(tokenizer, "Some text.")
    text = tokenizer.decode(workload.prompt(0))
    assert text.count("<|im_start|>") == 5  # system, user, assistant, user, assistant
    assert "<|im_start|>user\nResult of read('input.txt'):\n\nSome text.<|im_end|>" in text
    after = workload.prompt(1)
    assert tokenizer.decode(after).startswith("<|im_end|>\n<|im_start|>user\n")
    # The model may have ended its turn itself.
    assert workload.prompt(1, last=tokenizer.eos_token_id) == after[1:]


@pytest.mark.parametrize("kind", ["tools", "no system", "strict turns"])
def test_templates(smollm2: tuple[Any, Any], kind: str) -> None:
    template = {
        "tools": "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}{% endif %}{{ m.content }}{% endfor %}",
        "no system": "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}<{{ m.role }}>{{ m.content }}"
        "{% endfor %}",
        "strict turns": "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ raise_exception('no tool role, nor tool_calls') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}",
    }[kind]
    tokenizer = _with_template(smollm2[1], template)
    text = tokenizer.decode(agent_workload(tokenizer, "Some text.").prompt(0))
    assert ("<tool>Some text." in text) == (kind == "tools")
    assert ("<system>" in text) == (kind != "no system")
    assert "You are a programming assistant" in text
    assert "Some text." in text


def _with_template(tokenizer: Any, template: str) -> Any:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed
