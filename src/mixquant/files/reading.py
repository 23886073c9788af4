"""Reads JSON and YAML that somebody else wrote, and returns values that are safe to use, or one
sentence.

Parsers accept input that breaks the code behind them: values nested so deeply that a walk over them
overflows the stack, YAML aliases that expand a few lines to a gigabyte, numbers that cannot be
printed, text that cannot be encoded. The values that these functions return contain none of that.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any

DEEPEST = 100  # levels; known files have less than a tenth of that
_MAX_YAML_VALUES = 100_000  # with every alias written out
_LARGEST = 10**4300  # Python refuses to print larger integers


class ReadingError(ValueError):
    """Text in the wrong form. The message is one line and gives the position if it is known."""


def parse_json(text: str | bytes, *, foreign: bool = False) -> Any:
    """The value that a JSON text stands for.

    Args:
        foreign: the file is not written for us, so what others let pass may stand in it: NaN and
            Infinity, which some models' config.json holds, and a key twice, of which the last counts.

    Raises:
        ReadingError: no JSON, nested deeper than `DEEPEST` levels, with a key twice in one object, or
            with a number or a text in it that JSON does not have: NaN, one beyond all floats, one of
            5,000 digits, half a character.
    """
    try:
        value = json.loads(text, object_pairs_hook=dict if foreign else _without_duplicates)
    except json.JSONDecodeError as error:
        raise ReadingError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ReadingError(_TOO_DEEP) from None
    except UnicodeDecodeError:
        raise ReadingError("it is not UTF-8 text") from None
    except ReadingError:
        raise
    except ValueError:  # of int(), the only other one
        raise ReadingError(_TOO_LONG) from None
    for one in _parts(value):
        if isinstance(one, float) and not foreign and not math.isfinite(one):
            raise ReadingError(f"it holds {json.dumps(one)}, which is no number in JSON")
    return value


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ReadingError: no YAML, a key twice in one mapping, nested deeper than `DEEPEST` levels (as what
            contains itself is), grown by aliases to over 100,000 values, or with a number or a text in
            it that cannot be used.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        document = loader.get_single_node()
        if (twice := _key_twice(document)) is not None:
            raise ReadingError(
                f"line {twice.start_mark.line + 1}: {shown(twice.value)} appears twice"
            )
        value = None if document is None else loader.construct_document(document)
    except yaml.YAMLError as error:
        raise ReadingError(_cut(error)) from None
    except RecursionError:
        raise ReadingError(_TOO_DEEP) from None
    except ReadingError:
        raise
    except Exception as error:  # a date of 99 months, a number of 5,000 digits, an empty !!int
        raise ReadingError(f"a value cannot be read: {_cut(error)}") from None
    for number, _ in enumerate(_parts(value)):
        if number >= _MAX_YAML_VALUES:
            raise ReadingError(f"its aliases stand for more than {_MAX_YAML_VALUES:,} values")
    return value


def _key_twice(document: Any) -> Any:
    """The node of the first key that appears twice in one mapping of a YAML document, or None."""
    import yaml

    waiting, seen = [document], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        return key
                    keys.add((key.tag, key.value))
                waiting += [value, key]
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that appears twice: Python's parser silently takes the last value."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ReadingError(f"the key {shown(key)} appears twice in one object")
        values[key] = value
    return values


def shown(value: Any, limit: int = 100) -> str:
    """A value for a message: its repr, shortened, however large and deep the value is."""
    text = _REPR.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _cut(error: Exception, limit: int = 300) -> str:
    """A parser's message in one line, shortened: it may repeat a megabyte of the text."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"
_TOO_LONG = "it holds a number of more than 4,300 digits"

_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 90


def _parts(value: Any) -> Iterator[Any]:
    """All values and keys in one, itself among them; checks the depth, integers and texts."""
    left = [(value, 1)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            raise ReadingError(_TOO_DEEP)
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise ReadingError("it holds half a character (a lone surrogate)") from None
        elif isinstance(one, int) and abs(one) >= _LARGEST:
            raise ReadingError(_TOO_LONG)
        yield one
        if isinstance(one, dict):
            left += ((part, depth + 1) for pair in one.items() for part in pair)
        elif isinstance(one, (list, tuple, set)):
            left += ((part, depth + 1) for part in one)
