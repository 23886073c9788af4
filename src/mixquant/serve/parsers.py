"""Chooses vLLM's parsers for a model's tool calls and reasoning, by the model's chat template.

A template writes earlier tool calls in the form in which the model writes them. The name of a
checkpoint does not tell the form: models of one architecture differ.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["tool", "reasoning"]


@dataclass(frozen=True)
class _Family:
    """A parser, for templates that have all of these marks, and for model types that begin so."""

    parser: str
    marks: tuple[str, ...]
    model_types: str = ""

    def fits(self, template: str, model_type: str) -> bool:
        return all(re.search(mark, template) for mark in self.marks) and bool(
            re.match(self.model_types, model_type)
        )


# The first that fits is taken. The last ones are for templates that show no tools; models with such a
# template are trained on this form.
_FAMILIES: dict[Kind, tuple[_Family, ...]] = {
    "tool": (
        _Family("openai", (r"<\|channel\|>",), "gpt_oss"),
        _Family("seed_oss", (r"<seed:tool_call>",)),
        _Family("minimax_m2", (r"<minimax:tool_call>",)),
        _Family("longcat", (r"<longcat_tool_call>",)),
        _Family("glm45", (r"<arg_key>",)),
        _Family("qwen3_xml", (r"<function=", r"<parameter=")),
        _Family("mistral", (r"\[TOOL_CALLS\]",)),
        _Family("deepseek_v3", (r"<｜tool▁calls▁begin｜>", "```json")),
        _Family("deepseek_v31", (r"<｜tool▁calls▁begin｜>",)),
        _Family("kimi_k2", (r"<\|tool_calls_section_begin\|>",)),
        _Family("gemma4", (r"<\|tool_call>",)),
        _Family("functiongemma", (r"<start_function_call>",)),
        _Family("lfm2", (r"<\|tool_call_start\|>",)),
        _Family("phi4_mini_json", (r"<\|tool\|>",), "phi"),
        _Family("granite", (r"<\|tool_call\|>",), "granite"),
        _Family("olmo3", (r"<function_calls>",), "olmo"),
        _Family("internlm", (r"<\|action_start\|>",)),
        _Family("jamba", (r"<tool_calls>",), "jamba"),
        _Family("hermes", (r"<tool_call>",)),
        _Family("llama4_pythonic", (r"<\|header_start\|>",), "llama4"),
        _Family("llama3_json", (r"<\|start_header_id\|>",)),
        _Family("hermes", (r"<\|im_start\|>",)),
    ),
    "reasoning": (
        _Family("openai_gptoss", (r"<\|channel\|>",), "gpt_oss"),
        _Family("seed_oss", (r"<seed:think>",)),
        _Family("minimax_m2", (r"<minimax:tool_call>", "<think>")),
        _Family("gemma4", (r"<\|channel>",)),
        _Family("mistral", (r"\[THINK\]",)),
        _Family("glm45", (r"<arg_key>", "<think>")),
        _Family("kimi_k2", (r"<\|tool_calls_section_begin\|>", "<think>")),
        _Family("deepseek_v3", (r"<｜Assistant｜>", r"\bthinking\b", "</think>")),
        _Family("deepseek_r1", (r"<｜Assistant｜>.{0,9}<think>",)),
        _Family("granite", (r"<response>", r"<think>"), "granite"),
        _Family("qwen3", (r"<\|im_start\|>", "enable_thinking", "</think>")),
        _Family("qwen3", (r"<\|im_start\|>assistant(?:\\n|\n)<think>",)),
    ),
}
_REGISTRIES: dict[Kind, tuple[str, str]] = {
    "tool": ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "reasoning": ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}


def parser_for(kind: Kind, source: str, model_type: str) -> str | None:
    """The name of vLLM's parser for a checkpoint.

    Args:
        source: a directory or a hub name.
        model_type: what its configuration says.

    Returns:
        None where its chat template shows no form that is known, it has none, or the vLLM that is
        installed has no such parser.
    """
    template = _template(source)
    for family in _FAMILIES[kind]:
        if family.fits(template, model_type):
            available = _available(kind)
            return family.parser if available is None or family.parser in available else None
    return None


def is_known(kind: Kind, name: str) -> bool:
    """Whether the installed vLLM has a parser of this name; True if that cannot be found out."""
    available = _available(kind)
    return available is None or name in available


def _template(source: str) -> str:
    """A checkpoint's chat templates, one after the other if it has several."""
    if text := _text(source, "chat_template.jinja"):
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = json.loads(_text(source, name))
        except (ValueError, RecursionError):
            continue
        template = found.get("chat_template") if isinstance(found, dict) else None
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            parts = [one.get("template") for one in template if isinstance(one, dict)]
            return "\n".join(part for part in parts if isinstance(part, str))
    return ""


def _text(source: str, name: str) -> str:
    """A file of a checkpoint; empty if the checkpoint has none, or it cannot be downloaded."""
    path = Path(source) / name
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, name))
        except Exception:  # many classes, as for a model's configuration
            return ""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _available(kind: Kind) -> set[str] | None:
    """The names in vLLM's registry, read from its source, because the import takes seconds. None:
    unknown."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder, variable = _REGISTRIES[kind]
    path = Path(spec.submodule_search_locations[0]) / folder / "__init__.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == variable
            and isinstance(node.value, ast.Dict)
        ):
            names = ast.literal_eval(ast.Tuple([key for key in node.value.keys if key], ast.Load()))
            return {str(name) for name in names}
    return None
