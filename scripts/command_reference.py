"""Writes docs/reference/commands.md from the command line's own definitions.

    python scripts/command_reference.py           # write the page
    python scripts/command_reference.py --check   # exit code 1 if the page is not what would be written

`tests/unit/test_documents.py` makes the same check, so the page cannot fall behind the options.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands.md"
INTRODUCTION = """\
# Commands

<!-- Written by scripts/command_reference.py. Change the help texts in src/mixquant/cli instead. -->

`mixquant COMMAND --help` prints the same.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an unexpected error |
| 2 | something that was given cannot be used |
| 130 | interrupted |

An error is one line on standard error. With `MIXQUANT_TRACEBACK=1` the traceback is shown instead.
"""


def page() -> str:
    """The whole page, as Markdown."""
    from mixquant.cli import app

    group: Any = typer.main.get_command(app)
    sections = [INTRODUCTION]
    for name, command in group.commands.items():
        sections.append(_section(name, command))
    return "\n".join(sections)


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the page of commands")
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    options = parser.parse_args()
    made = page()
    if options.check:
        return int(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
