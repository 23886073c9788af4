"""Help texts: every option and argument of every command has one, and it names its subject."""

from __future__ import annotations

import re

import pytest
import typer.main

from mixquant import cli

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]

# A text that begins so only makes sense next to the option's name.
FRAGMENT = re.compile(r"(Of|For|To|After|Before|With|In|Those|It|Its|They|Takes|Only)\b")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_says_what_it_is(name: str) -> None:
    command = COMMANDS[name]
    assert re.match(r"[A-Z]\w+ .+\.", command.help)
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        if parameter.name != "help":
            assert text, f"{name} {parameter.opts}"
            assert re.match(r"[A-Zv][\w-]+ .+\.$", text), f"{name} {parameter.opts}: {text}"
            assert not FRAGMENT.match(text), f"{name} {parameter.opts}: {text}"


def test_the_listing_shows_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
