"""Writes the pages of docs/ that are made from the code: every command, and the patches of vLLM.

    python scripts/reference_pages.py

`tests/unit/test_documents.py` compares the pages with what would be written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = """\
# Commands

<!-- Written by scripts/reference_pages.py. Change the help texts in src/mixquant/cli instead. -->

`mixquant COMMAND --help` prints the same.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an unexpected error, or requests of `evaluate` that failed |
| 2 | an argument, an option or a file cannot be used |
| 130 | interrupted |

An error is one line on standard error. With `MIXQUANT_TRACEBACK=1` the traceback is shown instead.
"""


PATCHES = """\
# Patches of vLLM

<!-- Written by scripts/reference_pages.py from src/mixquant/engines/vllm/patches/__init__.py. -->

Where vLLM has a public hook, the plugin uses it: the entry point `vllm.general_plugins`, a
quantization method, `additional_config`, and `worker_extension_cls`. Where no hook serves, the plugin
wraps or replaces a function of vLLM. This is the complete list. At start, each patch of a model checks
that it took, and the table in the log says in how many places.
"""


def commands() -> str:
    """The page of every command, as Markdown."""
    from mixquant.cli import app

    group: Any = typer.main.get_command(app)
    sections = [COMMANDS]
    for name, command in group.commands.items():
        sections.append(_section(name, command))
    return "\n".join(sections)


def patches() -> str:
    """The page of patches, as Markdown."""
    from mixquant.engines.vllm.patches import LEDGER

    sections = [PATCHES]
    for one in LEDGER:
        lines = [f"## {one.module}", "", one.does, "", "| | |", "| --- | --- |"]
        lines.append(f"| changed | {'<br>'.join(_code(target) for target in one.targets)} |")
        for name, text in (
            ("why", one.why),
            ("guard", one.guard),
            ("versions read", one.read),
            ("versions run", one.run),
            ("needed until", one.until),
        ):
            lines.append(f"| {name} | {_cell(text)} |")
        sections.append("\n".join([*lines, ""]))
    return "\n".join(sections)


PAGES = {"reference/commands.md": commands, "develop/patches.md": patches}


def _code(target: str) -> str:
    return f"`{target}`" if "." in target and " " not in target else target


def _section(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=name)
    options = [one for one in command.params if one.param_type_name == "option"]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["mixquant", name, "[OPTIONS]", *(_usage(one) for one in arguments)])
    lines = [f"## mixquant {name}", "", "```text", usage, "```", "", _prose(command.help), ""]
    if arguments:
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [f"| `{_metavar(one)}` | {_cell(one.help)} |" for one in arguments]
        lines.append("")
    if options:
        lines += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(one, context) for one in options if not one.hidden]
        lines.append("")
    return "\n".join(lines)


def _prose(text: str | None) -> str:
    """Help text: paragraphs; what Click prints line by line (after a \\b) as a code block."""
    blocks = []
    for block in re.split(r"\n\s*\n", (text or "").replace("\f", "").strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines and lines[0] == "\b":
            blocks.append("\n".join(["```text", *lines[1:], "```"]))
        else:
            blocks.append(_plain(" ".join(lines)))
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Rich's markup as Markdown's."""
    return re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text)


def _cell(text: str | None) -> str:
    return _plain(" ".join((text or "").split())).replace("|", "\\|")


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _usage(argument: Any) -> str:
    name = _metavar(argument)
    return name if argument.required else f"[{name}]"


def _row(option: Any, context: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag else f"`{_value(option, context)}`".replace("|", "\\|")
    cells = [", ".join(f"`{one}`" for one in names), value, _default(option), _cell(option.help)]
    return f"| {' | '.join(cells)} |"


def _value(option: Any, context: Any) -> str:
    """What the help shows as the value: the metavar, the choices, or the type."""
    if option.metavar:
        return str(option.metavar)
    shown = str(option.display_type(context)).strip("<>").removesuffix(" range")
    return shown if "|" in shown else shown.upper()


def _default(option: Any) -> str:
    """What the help shows as the default; nothing for flags that are off."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default.strip("()")
    default = option.default
    if default in (None, "", [], ()) or callable(default) or option.show_default is False:
        return ""
    if option.is_flag:
        names = option.opts if default else option.secondary_opts
        return f"`{names[0]}`" if option.secondary_opts else ""
    return f"`{getattr(default, 'value', default)}`"


if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
