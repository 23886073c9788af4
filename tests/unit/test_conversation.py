"""Chats by models' templates: whole, in the form that the template takes, or refused in one line."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mixquant import cli
from mixquant.checkpoints.errors import ModelError
from mixquant.conversation import TemplateError, opening, render, reply
from mixquant.evaluate.compare.workload import agent_workload

QUESTION = [{"role": "user", "content": "Where is the key?"}]

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
# As multimodal models write theirs: over a text, this loop goes through characters without a `text`.
OF_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<answer>"
)
OF_EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}<answer>"
)
LAST_ONLY = "<user>{{ messages[-1].content }}<answer>"
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
)
EMPTY = "Hello!<answer>"
# Rewrites what it is given, and loses nothing.
STRIPPED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim | upper }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", [PLAIN, OF_PARTS, OF_EITHER])
def test_the_question_is_there_whatever_form_of_content_the_template_takes(
    tokenizer: Any, template: str
) -> None:
    changed = with_template(tokenizer, template)
    assert render(changed, QUESTION) == "<user>Where is the key?<answer>"
    assert changed.decode(opening(changed, QUESTION)) == "<user>Where is the key?<answer>"
    # From after the earlier answer on.
    assert changed.decode(reply(changed, "And now?")) == "<user>And now?<answer>"
    with_system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert render(changed, with_system).startswith("<system>Be brief.<user>Where")


def test_templates_may_rewrite_what_they_keep(tokenizer: Any) -> None:
    with pytest.raises(TemplateError):  # letters of the marks, too
        render(with_template(tokenizer, "{{ messages[0].content | replace('@', '') }}"), QUESTION)
    changed = with_template(tokenizer, STRIPPED)
    assert render(changed, [{"role": "user", "content": " Where? "}]) == "<user>WHERE?<answer>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (EMPTY, "leaves out the user's message"),
        ("{% for m in messages %}{{ m.content", "fails: "),
        ("{{ messages[7].content.x }}", "fails: "),
        ("{{ raise_exception('Only even numbers\nof messages') }}", "fails: Only even numbers of"),
        ({"rag": PLAIN}, "fails: "),
    ],
)
def test_templates_that_cannot_say_it_are_refused(tokenizer: Any, template: Any, says: str) -> None:
    changed = with_template(tokenizer, template)
    with pytest.raises(TemplateError) as refused:
        opening(changed, QUESTION)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, ModelError)  # one line and exit code 2


def test_templates_that_drop_earlier_answers_are_refused_before_anything_is_computed(
    tokenizer: Any,
) -> None:
    changed = with_template(tokenizer, LAST_ONLY)
    assert render(changed, QUESTION) == "<user>Where is the key?<answer>"
    with pytest.raises(TemplateError, match="leaves out"):
        reply(changed, "And now?")
    with pytest.raises(TemplateError, match="leaves out"):
        agent_workload(changed, "Some text.")
    no_answers = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="leaves out earlier answers"):
        reply(with_template(tokenizer, no_answers), "And now?")


def test_a_system_prompt_is_not_dropped_silently(tokenizer: Any) -> None:
    changed = with_template(tokenizer, NO_SYSTEM)
    with pytest.raises(TemplateError, match="leaves out the system's message"):
        render(changed, [{"role": "system", "content": "Be brief."}, *QUESTION])
    # The workload says it in the user's message instead.
    assert "You are a programming assistant" in changed.decode(
        agent_workload(changed, "Some text.").prompt(0)
    )


@pytest.mark.parametrize(
    ("arguments", "template", "says"),
    [
        (["generate", "Where?"], "{% if", "chat template fails: "),
        (["generate", "Where?"], EMPTY, "leaves out the user's message"),
        (["chat"], LAST_ONLY, "leaves out"),
        (["chat", "--system", "Be brief."], NO_SYSTEM, "leaves out the system's message"),
        (["compare"], LAST_ONLY, "leaves out"),
    ],
)
def test_the_commands_refuse_in_one_line(
    smollm2_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    template: str,
    says: str,
) -> None:
    """Without weights: what cannot be said is found before they are loaded."""
    for file in Path(smollm2_path).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    command, *rest = arguments
    assert cli.main([command, str(tmp_path), *rest]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: this model's chat template ")
    assert says in line
