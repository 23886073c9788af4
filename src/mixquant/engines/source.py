"""What a module's forward computes, as its source says: for code that may stand in for it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def _read(kind: Any) -> tuple[str, ...]:
    if hasattr(kind.forward, "__wrapped__"):
        return ()
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return ()
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return ()
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return tuple(ast.unparse(statement) for statement in body)


statements_of_forward: Callable[[Any], tuple[str, ...]] = functools.cache(_read)
"""The statements of a module class's forward, as ast.unparse writes them, without a docstring.

An empty tuple where the source is not known, or not all of it: a function that is decorated, or that
another library has put in front of the class's own.
"""
