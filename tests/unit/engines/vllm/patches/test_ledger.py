"""The ledger of patches: it names every module that patches, and targets that this vLLM has."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
from vllm_engines import require_vllm

require_vllm()

from mixquant.engines.vllm import patches  # noqa: E402
from mixquant.engines.vllm.patches import LEDGER, Patch  # noqa: E402

# What a patch is made of, and no patch itself.
PARTS = {"model", "outcome"}
# Attributes of instances, which their classes have not.
OF_INSTANCES = ("_forward_method",)


def test_every_module_that_patches_is_listed() -> None:
    modules = {one.name for one in pkgutil.iter_modules(patches.__path__)}
    assert {patch.module for patch in LEDGER} == modules - PARTS
    assert len({patch.module for patch in LEDGER}) == len(LEDGER)


def found(target: str) -> bool:
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            place: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            if name in OF_INSTANCES:
                continue
            if not hasattr(place, name):
                return False
            place = getattr(place, name)
        return True
    return False


@pytest.mark.parametrize("patch", LEDGER, ids=lambda patch: patch.module)
def test_this_vllm_has_what_is_patched(patch: Patch) -> None:
    """Each class, in one of the places where versions have it."""
    targets = [target for target in patch.targets if target.startswith("vllm.")]
    classes = {target.split(".")[-2] for target in targets}
    for name in classes:
        there = [target for target in targets if target.split(".")[-2] == name]
        assert any(map(found, there)), f"{name}: none of {there}"
