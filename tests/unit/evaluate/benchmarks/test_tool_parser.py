"""Benchmarks with tools: a server that could not parse their calls is not started at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixquant import cli
from mixquant.checkpoints.models import find
from mixquant.evaluate.benchmarks.tool_parser import with_tool_parser
from mixquant.evaluate.tasks import TaskError
from mixquant.evaluate.tasks.registry import TASKS, task
from mixquant.serve import parsers
from mixquant.servers.arms import ServedArm, chosen_arms

HERMES = "{% for m in messages %}<|im_start|>{{ m }}<tool_call>{% endfor %}"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with nothing but a configuration and a chat template."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (directory / "chat_template.jinja").write_text(HERMES)
    monkeypatch.setattr(parsers, "_available", lambda kind: {"hermes", "mistral"})
    return directory


def decided(model: Path, *arguments: str) -> tuple[tuple[str, ...], list[str]]:
    notes: list[str] = []
    arm = ServedArm("bf16", arguments=arguments)
    changed = with_tool_parser(arm, find(str(model)), "bfcl-v4", notes.append)
    return changed.arguments, notes


def test_the_parser_fits_the_chat_template(model: Path) -> None:
    arguments, notes = decided(model, "--max-model-len", "4096")
    chosen = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    assert arguments == ("--max-model-len", "4096", *chosen)
    assert notes == ["bf16: tool calls are parsed as hermes, by the chat template"]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (("--tool-call-parser", "mistral"), ("--enable-auto-tool-choice",)),
        (("--tool_call_parser=mistral",), ("--enable-auto-tool-choice",)),
        (("--enable-auto-tool-choice", "--tool-call-parser=mistral"), ()),
        (
            ("--tool-parser-plugin", "own.py", "--tool-call-parser", "own"),
            ("--enable-auto-tool-choice",),
        ),
    ],
)
def test_a_parser_that_is_named_is_taken(
    model: Path, given: tuple[str, ...], added: tuple[str, ...]
) -> None:
    assert decided(model, *given) == ((*given, *added), [])


def test_an_unknown_parser_is_refused(model: Path) -> None:
    with pytest.raises(TaskError, match=r"bfcl-v4: bf16: vLLM has no tool-call parser 'hermse'"):
        decided(model, "--tool-call-parser", "hermse")


def test_tasks_that_offer_tools_say_so() -> None:
    assert [name for name in TASKS if task(name).needs_tools] == ["bfcl-v4", "tau2-bench"]


@pytest.mark.parametrize("template", ["{{ messages }}", HERMES])
def test_the_command_checks_before_it_starts_anything(
    model: Path,
    template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (model / "chat_template.jinja").write_text(template)
    monkeypatch.chdir(tmp_path)
    loaded: list[Any] = []

    def load(_: Any, options: Any, *__: Any) -> None:
        loaded.extend(options.arms)
        raise TaskError("the data is read, so the check has passed")

    monkeypatch.setattr("mixquant.evaluate.benchmarks.run.load", load)

    arguments = ["evaluate", str(model), "--benchmark", "bfcl-v4", "--context", "4096"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    if template == HERMES:
        assert [arm.arguments[:3] for arm in loaded] == [
            ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
        ] * len(chosen_arms(loaded[-1].recipe))
        assert "the check has passed" in said
    else:
        assert loaded == []
        assert "no parser is known for the chat template" in said
        assert "--vllm-args '--tool-call-parser NAME'" in said
