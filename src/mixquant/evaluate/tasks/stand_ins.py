"""Empty modules in place of libraries that an import needs and later code does not.

The packages of benchmarks import the clients of every vendor whose models they list, in versions
that clash with vLLM's. Here one client of ours asks the models, so the others need not be
installed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """While the block lasts, these modules can be imported, and every name of theirs is an empty class.

    Afterwards `sys.modules` is as before: what was imported in the block keeps its stand-ins, nobody
    else gets them.
    """
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = _StandIn(name)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
