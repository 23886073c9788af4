"""What a command refuses with."""

from __future__ import annotations

import re

import pytest

from mixquant import cli


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error, which lines of progress may precede."""
    assert cli.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *progress, line = printed.err.splitlines(keepends=True)
    assert all(re.fullmatch(r"\w+: .*\(\d+%\), \d+ s so far\n", told) for told in progress)
    assert line.startswith("error: ") and line.endswith("\n")
    return line
