"""Input as nobody would write it: odd values of every kind, and good documents with some in them."""

from __future__ import annotations

import copy
import json
from typing import Any

from example_counts import up_to
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples each time, some seconds of them.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=up_to(150),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DEEP = "[" * 3_000
LONG = "9" * 5_000

# What a program takes for granted that it will not meet.
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "0",
    "\x00",
    "\n",
    "x" * 5_000,
    "\ud800",
    "{%",
    "$\\frac",
    "ｆｐ８",
    [],
    {},
    [[]],
    [None],
    ["x", 1],
    {"": None},
    {"x": {"x": {"x": []}}},
]

values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed(document: Any, *, most: int = 2) -> st.SearchStrategy[Any]:
    """The document with one to ``most`` of its parts replaced, left out or put elsewhere."""

    @st.composite
    def change(draw: st.DrawFn) -> Any:
        result = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, most))):
            where, key = draw(st.sampled_from(list(places(result))))
            if draw(st.booleans()) or not isinstance(where, dict):
                where[key] = copy.deepcopy(draw(values))
            else:
                del where[key]
            if not list(places(result)):
                break
        return result

    return change()


def texts(document: Any) -> st.SearchStrategy[str]:
    """JSON texts near the document's: changed, cut, or with characters in them that do not belong."""

    @st.composite
    def broken(draw: st.DrawFn) -> str:
        text = json.dumps(document)
        place = draw(st.integers(0, len(text)))
        inserted = draw(
            st.sampled_from(["", "{", "]", '"', "\\ud800", "\x00", DEEP, LONG, "1e999"])
        )
        return text[:place] + inserted + text[place + draw(st.integers(0, 20)) :]

    return changed(document).map(json.dumps) | broken()


def places(value: Any) -> Any:
    """The parts of a document, each as its container and its key there."""
    pairs: Any = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, part in pairs:
        yield value, key
        yield from places(part)


def is_one_line(message: str) -> bool:
    """Whether it can be shown as what was wrong: not empty, one line, short, of whole characters."""
    message.encode()
    return bool(message.strip()) and "\n" not in message and len(message) < 2_000
