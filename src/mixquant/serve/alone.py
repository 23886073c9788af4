"""Runs a module of this package as a program, by path: ``python -P alone.py front --host ...``.

This does not import the package itself, nor torch, which a front and a router do not need. So they
start at once. The modules that they import must not need torch, either.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path


def main() -> None:
    package = types.ModuleType("mixquant")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["mixquant"] = package
    module = sys.argv.pop(1)
    runpy.run_module(f"mixquant.serve.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
