"""The mutations of scripts/mutations.py fit the code, and the page of what they find names them."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
from paths import REPOSITORY

MUTATIONS: dict[str, Any] = runpy.run_path(str(REPOSITORY / "scripts" / "mutations.py"))[
    "MUTATIONS"
]
PAGE = REPOSITORY / "docs" / "develop" / "tests.md"


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_can_be_made(name: str) -> None:
    mutation = MUTATIONS[name]
    source = REPOSITORY / "src" / "mixquant" / mutation.file
    assert source.read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.new != mutation.old
    for file in [*(f"unit/{one}" for one in mutation.unit), *mutation.real]:
        assert (REPOSITORY / "tests" / file).is_file(), file


def test_the_page_has_a_row_for_each_and_none_that_no_test_sees() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d+) \| [^|]+ \|$", text, re.MULTILINE)
    found = dict(rows)
    assert list(found) == list(MUTATIONS)
    assert all(int(count) > 0 for count in found.values())
