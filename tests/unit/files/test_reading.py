"""JSON and YAML of others: what parsers let pass and code behind them does not survive."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mixquant.files.reading import DEEPEST, ReadingError, parse_json, parse_yaml, shown

LONG = "9" * 5_000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper than 100 levels"),
        ('{"a":' * 100_000, "nested deeper than 100 levels"),
        (LONG, "more than 4,300 digits"),
        (f'{{"a": [-{LONG}]}}', "more than 4,300 digits"),
        ("NaN", "holds NaN, which is no number in JSON"),
        ("[1e999]", "holds Infinity, which is no number in JSON"),
        ('"\\ud800"', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        (b"\xff", "not UTF-8"),
        ('{"a": 1,\n "b"}', "line 2, column 5: "),
        ("", "line 1, column 1: "),
    ],
)
def test_json_that_nothing_survives_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ReadingError) as refused:
        parse_json(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_json_is_what_it_is() -> None:
    assert parse_json('{"a": [1, 2.5, null, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, "😀"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(b'"\xc3\xa9"') == "é"
    assert parse_json("9" * 4_000) == int("9" * 4_000)
    # As Mamba's config.json has it.
    assert parse_json('{"time_step_limit": [0.0, Infinity]}', foreign=True) == {
        "time_step_limit": [0.0, float("inf")]
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 3_000, "nested deeper than 100 levels"),
        ("&a [*a]", "nested deeper than 100 levels"),
        (LAUGHS, "aliases stand for more than 100,000 values"),
        (LONG, "4300 digits"),
        ("0x" + "f" * 5_000, "more than 4,300 digits"),
        ("a: 2026-99-99", "a value cannot be read: month"),
        ("!!int ''", "a value cannot be read"),
        ('"\\ud800"', "half a character"),
        ("a: [", "line 1, column 5"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (f"? {'k' * 10**6}\n: 1\n? {'k' * 10**6}\n: 2", "appears twice"),
        (f"a: !{'x' * 10**6}", "could not determine a constructor"),
        (f'!!float "{"z" * 10**6}"', "a value cannot be read"),
        (f'!!bool "{"z" * 10**6}"', "a value cannot be read"),
    ],
)
def test_yaml_that_nothing_survives_is_refused(text: str, says: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ReadingError) as refused:
        parse_yaml(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert time.monotonic() - begun < 20


def test_other_yaml_is_what_it_is() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": [{"x": 1}, {"x": 1}]},
    }


def test_what_is_shown_of_a_value_is_short_whatever_it_is() -> None:
    everything: list[Any] = ["x"]
    for _ in range(60):
        everything = [everything] * 60  # 60^60 values, were they written out
    for value in (everything, "x" * 10**7, 10**4000, {"a": "x" * 5_000}, list(range(10**6))):
        assert len(shown(value)) <= 100
    assert shown("x") == "'x'"
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
