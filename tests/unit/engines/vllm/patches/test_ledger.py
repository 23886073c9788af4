"""The ledger of patches: it names every module that patches, and what this vLLM has that they change."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_engines import require_vllm

require_vllm()

from vllm.config import VllmConfig  # noqa: E402
from vllm.v1.engine.input_processor import InputProcessor  # noqa: E402

from mixquant.engines.vllm import patches  # noqa: E402
from mixquant.engines.vllm.patches import (  # noqa: E402
    LEDGER,
    Patch,
    beams,
    configuration,
    runners,
)

# What a patch is made of, and no patch itself.
PARTS = {"model", "outcome"}
# Attributes of instances, which their classes have not.
OF_INSTANCES = ("_forward_method", "_use_min_latency_gemm")


def test_every_module_that_patches_is_listed() -> None:
    modules = {one.name for one in pkgutil.iter_modules(patches.__path__)}
    names = [patch.module for patch in LEDGER]
    assert {name for name in names if "." not in name} == modules - PARTS
    assert len(set(names)) == len(names)
    for name in names:
        assert "." not in name or importlib.util.find_spec(f"mixquant.{name}") is not None


def owner_of(target: str) -> Any:
    """The class that has a target as its attribute; None where this vLLM has no such class."""
    *module, name, _ = target.split(".")
    try:
        return getattr(importlib.import_module(".".join(module)), name, None)
    except ImportError:
        return None


@pytest.mark.parametrize("patch", LEDGER, ids=lambda patch: patch.module)
def test_this_vllm_has_what_is_patched(patch: Patch) -> None:
    """Each attribute, in every class that is there, and one class of each name is there."""
    there: dict[str, bool] = {}
    for target in patch.targets:
        if not target.startswith("vllm."):
            continue
        name, attribute = target.split(".")[-2:]
        owner = owner_of(target)
        there[name] = there.get(name, False) or owner is not None
        if owner is not None and attribute not in OF_INSTANCES:
            assert hasattr(owner, attribute), target
    missing = [name for name, found in there.items() if not found]
    assert not missing, f"none of these classes: {missing}"


def replaced(of: type, patching: Callable[[type], None]) -> set[str]:
    """What patching replaces in a class, done to a class derived from it.

    Another test of this process may have patched the class itself.
    """
    originals = {
        name: value.__wrapped__ for name, value in vars(of).items() if hasattr(value, "mixquant")
    }
    derived = type(of.__name__, (of,), {**originals, "mixquant_follows": False})
    before = dict(vars(derived))
    patching(derived)
    changed = {name for name, value in vars(derived).items() if value is not before.get(name)}
    found = changed - {"mixquant_follows"}
    return {f"{of.__module__}.{of.__qualname__}.{name}" for name in found if hasattr(of, name)}


def listed(module: str, of: type) -> set[str]:
    """What the ledger says that a module replaces in a class."""
    (patch,) = (patch for patch in LEDGER if patch.module == module)
    return {target for target in patch.targets if owner_of(target) is of}


def test_all_that_is_replaced_in_the_runners_is_listed() -> None:
    for module, prepare in ((runners.V1, "_prepare_inputs"), (runners.V2, "prepare_inputs")):
        of = importlib.import_module(module).GPUModelRunner
        found = replaced(
            of, partial(runners._wrap, prepare=prepare, note=None, config_class=object)
        )
        assert found == listed("runners", of)
        assert len(found) == 5


@pytest.mark.parametrize("times", [0, 1], ids=["not patched", "patched"])
def test_all_that_is_replaced_in_the_configuration_is_listed(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__)  # is put back
    for _ in range(times):
        configuration.install(VllmConfig)
    assert replaced(VllmConfig, configuration.install) == {
        f"vllm.config.vllm.VllmConfig.{target.rpartition('.')[2]}"
        for target in listed("configuration", VllmConfig)
    }


def test_all_that_is_replaced_for_beams_is_listed() -> None:
    (patch,) = (patch for patch in LEDGER if patch.module == "beams")
    (sequence,) = {owner_of(target) for target in patch.targets} - {None, InputProcessor}
    other: Any = SimpleNamespace(get_prompt=len, process_inputs=len)
    found = replaced(sequence, lambda derived: beams._wrap(derived, other))
    assert found == listed("beams", sequence)
    other = SimpleNamespace(get_prompt=len, process_inputs=len)
    found = replaced(InputProcessor, lambda derived: beams._wrap(other, derived))
    assert found == listed("beams", InputProcessor)
