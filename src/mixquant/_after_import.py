"""Runs something once another library's module has been imported, without importing it now."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Finder(MetaPathFinder):
    """Finds what the finders behind it find, and adds the actions to what loading does."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute, actions = spec.loader.exec_module, self.actions[name]

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in actions:
                    action(module)

            # On this one loader, which is the module's own: a wrapper would have to stand for all
            # else that a loader does (get_source, get_data, ...).
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def after_import(name: str, action: Action) -> None:
    """Calls ``action`` with the module ``name``: now if it is loaded, else right after it is.

    The finder stays in place, so a module that is loaded again (its first import failed, or
    `importlib.reload`) has the action done again.
    """
    actions = _finder.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if name in sys.modules:
        # Not sys.modules[name]: another thread may be in the middle of its import, which this awaits.
        action(importlib.import_module(name))
