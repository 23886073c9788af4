"""Parsers of tool calls and reasoning, told by chat templates; and the arguments that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixquant import cli
from mixquant.serve import parsers
from mixquant.serve.commands import processes
from mixquant.serve.containers import alone
from mixquant.serve.description import Deployment
from mixquant.serve.parsers import parser_for

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
QWEN3 = (
    CHATML
    + '<tool_call>\n{"name": ...}</tool_call>{% if enable_thinking %}<think></think>{% endif %}'
)
# What is in the templates of these families, and in no other's.
TEMPLATES = {
    "SmolLM2": (CHATML, "llama", "hermes", None),
    "Qwen2.5": (CHATML + '<tool_call>\n{"name": <function-name>', "qwen2", "hermes", None),
    "Qwen3": (QWEN3, "qwen3", "hermes", "qwen3"),
    "Qwen3-Thinking": (
        CHATML + "<tool_call><|im_start|>assistant\\n<think>", "qwen3", "hermes", "qwen3",
    ),
    "Qwen3-Coder": (CHATML + "<tool_call>\n<function=f>\n<parameter=p>", "qwen3_moe", "qwen3_xml", None),
    "Llama 3.1": ("<|start_header_id|>{{ role }}<|python_tag|>", "llama", "llama3_json", None),
    "Mistral": ("[INST][AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", "mistral", None),
    "Magistral": ("[SYSTEM_PROMPT][TOOL_CALLS][THINK]", "mistral", "mistral", "mistral"),
    "DeepSeek-V3": ("<｜tool▁calls▁begin｜>```json", "deepseek_v3", "deepseek_v3", None),
    "DeepSeek-R1": (
        "<｜tool▁calls▁begin｜>```json<｜Assistant｜><think>\\n",
        "deepseek_v3", "deepseek_v3", "deepseek_r1",
    ),
    "GLM-4.5": ("<tool_call>{name}<arg_key><think>", "glm4_moe", "glm45", "glm45"),
    "gpt-oss": ("<|start|>assistant<|channel|>analysis", "gpt_oss", "openai", "openai_gptoss"),
    "a base model": ("", "llama", None, None),
    "another": ("{{ messages }}", "llama", None, None),
}  # fmt: skip


def write(folder: Path, template: Any, where: str) -> str:
    if where == "chat_template.jinja":
        (folder / where).write_text(template)
    elif where == "several":
        named = [{"name": "default", "template": ""}, {"name": "tool_use", "template": template}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    else:
        (folder / where).write_text(json.dumps({"chat_template": template}))
    return str(folder)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    "where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "several"]
)
def test_a_template_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, where: str
) -> None:
    monkeypatch.setattr(parsers, "_available", lambda kind: None)
    template, model_type, tool, reasoning = TEMPLATES[family]
    source = write(tmp_path, template, where)
    assert parser_for("tool", source, model_type) == tool
    assert parser_for("reasoning", source, model_type) == reasoning


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"chat_template": 5}', '{"chat_template": [5]}']
)
def test_a_template_that_cannot_be_read_tells_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert parser_for("tool", str(tmp_path), "llama") is None


def test_a_parser_that_this_vllm_does_not_have_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, QWEN3, "chat_template.jinja")
    monkeypatch.setattr(parsers, "_available", lambda kind: {"mistral"})
    assert parser_for("tool", source, "qwen3") is None


def test_vllms_registries_are_read_without_importing_them() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for kind, manager in (("tool", ToolParserManager), ("reasoning", ReasoningParserManager)):
        available = parsers._available(kind)  # type: ignore[arg-type]
        assert available == set(manager.list_registered())
        assert {one.parser for one in parsers._FAMILIES[kind]} <= available  # type: ignore[index]


@pytest.mark.parametrize("deployment", [{}, {"prefill": 1, "decode": 1}])
def test_engines_are_started_with_them(deployment: dict[str, Any]) -> None:
    def lines(**more: Any) -> list[str]:
        described = Deployment(model="m", **deployment, **more)
        started = processes(described, alone, gpus=[])
        return [
            " ".join(one.argv) for one in started if one.role in ("prefill", "decode", "colocated")
        ]

    for line in lines(tool_parser="hermes", reasoning_parser="qwen3"):
        assert (
            "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3" in line
        )
    for unset in ("none", "auto"):
        for line in lines(tool_parser=unset, reasoning_parser=unset, vllm_arguments="--x y"):
            assert "parser" not in line and "tool-choice" not in line
            # The user's own come later, so that they count.
            assert line.index("--enable-prompt-tokens-details") < line.index("--x y")


def test_the_command_says_which_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    write(tmp_path, QWEN3, "chat_template.jinja")
    asking = ["serve", str(tmp_path), "--prefill", "1", "--decode", "1", "--render", "compose"]
    assert cli.main([*asking, "--image", "i"]) == 0
    printed = capsys.readouterr()
    assert "- hermes" in printed.out and "- qwen3" in printed.out
    assert "tool calls are parsed as hermes" in printed.err
    off = ["--tool-parser", "none", "--reasoning-parser", "none"]
    assert cli.main([*asking, "--image", "i", *off]) == 0
    printed = capsys.readouterr()
    assert "parser" not in printed.out
    assert printed.err == ""
    assert cli.main([*asking, "--tool-parser", "two words"]) == 2
    assert "tool_parser" in capsys.readouterr().err
