"""What a recipe is tuned for: the formats that a target multiplies, and their rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixquant.core.recipe import FORMATS, FormatName
from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown
from mixquant.formats import native_formats
from mixquant.hardware import cuda_formats

# Rates of products next to BF16's, as vendors state them for dense products.
NOMINAL: Mapping[str, float] = {"nvfp4": 4.0, "fp8": 2.0, "int8": 2.0, "bf16": 1.0}
_CAPABILITIES = {"blackwell": (10, 0), "hopper": (9, 0), "ada": (8, 9), "ampere": (8, 0)}


class TargetError(MixquantError, ValueError):
    """A target or a file of rates that cannot be used. The message is one line."""


@dataclass(frozen=True)
class Target:
    """A device that recipes are for.

    Attributes:
        name: ``blackwell``, ``hopper``, ``ada``, ``ampere`` or ``cpu``, or what is at hand.
        formats: what it multiplies natively, the fastest first; without bf16.
        rates: of a product, in any unit, by format; of each format and of bf16.
    """

    name: str
    formats: tuple[FormatName, ...]
    rates: Mapping[str, float]

    @property
    def plain(self) -> FormatName:
        """The fastest format: the recipe that costs come from has it everywhere."""
        return self.formats[0]


def target(name: str | None, device: torch.device) -> Target:
    """The target of this name; for None the device at hand.

    Raises:
        TargetError: no such target, or one that multiplies no format but BF16.
    """
    if name is None:
        native = native_formats(device)
        name = "this GPU" if device.type == "cuda" else device.type
    elif name == "cpu":
        native = frozenset({"int8"})
    elif name in _CAPABILITIES:
        native = cuda_formats(_CAPABILITIES[name])
    else:
        known = ", ".join((*_CAPABILITIES, "cpu"))
        raise TargetError(f"unknown target {shown(name)}; expected {known}")
    if not native:
        raise TargetError(
            f"{name} multiplies no format but BF16 natively; name the device that the recipe is for "
            "with --target"
        )
    return Target(name, _fastest_first(native, NOMINAL), NOMINAL)


def with_rates(one: Target, path: Path) -> Target:
    """The target with the rates in a file that ``benchmarks/ceilings.py --json`` wrote.

    A format that was not measured keeps its nominal rate next to BF16's.

    Raises:
        TargetError: the file cannot be read, or is none of rates.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ReadingError) as error:
        raise TargetError(f"cannot read rates from {path}: {error}") from None
    rates = values.get("tflops") if isinstance(values, dict) else None
    usable = isinstance(rates, dict) and "bf16" in rates and set(rates) <= set(FORMATS)
    if not isinstance(rates, dict) or not usable or not all(map(_is_rate, rates.values())):
        raise TargetError(
            f'{path} holds no rates: expected {{"tflops": {{"bf16": 650.0, ...}}}} as '
            "benchmarks/ceilings.py --json writes it"
        )
    measured = {name: float(rate) for name, rate in rates.items()}
    every = {name: rate * measured["bf16"] for name, rate in NOMINAL.items()} | measured
    return replace(one, formats=_fastest_first(frozenset(one.formats), every), rates=every)


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]


def _fastest_first(native: frozenset[str], rates: Mapping[str, float]) -> tuple[FormatName, ...]:
    return tuple(sorted((f for f in FORMATS if f in native), key=lambda name: -rates[name]))
