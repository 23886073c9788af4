"""The cost model: by hand, and against what `mixquant fidelity` counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixquant
from mixquant.core.recipe import FormatName
from mixquant.evaluate.fidelity.cost import cost
from mixquant.tune.choice import Choice
from mixquant.tune.cost import CostModel
from mixquant.tune.targets import NOMINAL, Target, target, with_rates
from mixquant.tune.units import Unit, Units, units_of

BLACKWELL = Target("blackwell", ("nvfp4", "fp8"), NOMINAL)
FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8", "bf16")


def units(*work: int, fixed: int = 0) -> Units:
    made = (Unit(f"model.layers.{n}.mlp.up_proj", "", (0, 1), one) for n, one in enumerate(work))
    return Units(tuple(made), fixed)


def choice(*formats: FormatName, head: int = 0, tail: int = 1) -> Choice:
    return Choice(formats, "6", head, tail)


def test_by_hand() -> None:
    cost = CostModel(units(300, 100), BLACKWELL, 1001)
    assert cost.time(choice("nvfp4", "nvfp4")) == 1
    plain = 1000 * 400 / 4 + 400
    with_fp8 = 1000 * (300 / 4 + 100 / 2) + 400
    assert cost.time(choice("nvfp4", "fp8")) == pytest.approx(with_fp8 / plain)
    with_tail = 900 * 400 / 4 + 101 * 400
    assert cost.time(choice("nvfp4", "nvfp4", head=4, tail=97)) == pytest.approx(with_tail / plain)
    everything = choice("bf16", "bf16")
    assert cost.time(everything) == pytest.approx(1001 * 400 / plain)
    assert cost.bits(choice("nvfp4", "fp8")) == pytest.approx(0.75 * 4.5 + 0.25 * 8)


def test_more_precise_rows_than_the_prompt_has() -> None:
    cost = CostModel(units(300, 100), BLACKWELL, 10)
    all_precise = choice("nvfp4", "nvfp4", head=16, tail=256)
    assert cost.time(all_precise) == pytest.approx(cost.time(choice("bf16", "bf16")))


@given(
    st.lists(st.sampled_from(FORMATS), min_size=4, max_size=4),
    st.integers(0, 64),
    st.integers(1, 256),
    st.integers(0, 3),
)
def test_monotone(formats: list[FormatName], head: int, tail: int, unit: int) -> None:
    """A more precise unit, head or tail never costs less, and `times` adds up to `time`."""
    cost = CostModel(units(7, 300, 100, 41, fixed=11), BLACKWELL, 2048)
    one = choice(*formats, head=head, tail=tail)
    more = [fmt if n != unit else "bf16" for n, fmt in enumerate(formats)]
    assert cost.time(replace(one, formats=tuple(more))) >= cost.time(one)
    assert cost.time(replace(one, precise_head=head + 1)) >= cost.time(one)
    assert cost.time(replace(one, precise_tail=tail + 1)) >= cost.time(one)
    others = [choice(*[fmt] * 4, head=head, tail=tail) for fmt in formats]
    by_unit = sum(cost.times(f, head, tail)[n] for n, f in enumerate(formats))
    fixed = cost.time(others[0]) - cost.times(formats[0], head, tail).sum()
    assert cost.time(one) == pytest.approx(by_unit + fixed)


def test_bits_are_those_of_fidelity() -> None:
    model = tiny_models.build("llama")
    found = units_of(model, ("nvfp4", "fp8"))
    assert len(found) == 14
    formats = tuple(FORMATS[n % 3] for n in range(14))
    one = Choice(formats, "4/6", 4, 32)
    mixquant.prepare(model, one.recipe(found, "nvfp4"))
    made = mixquant.summary(model)
    counted = cost("arm", made.layers, model.config.to_dict(), "lm_head")
    assert CostModel(found, BLACKWELL, 8192).bits(one) == pytest.approx(counted.bits)


def test_targets() -> None:
    cpu = torch.device("cpu")
    for name, formats in (
        ("blackwell", ("nvfp4", "fp8")),
        ("hopper", ("fp8", "int8")),
        ("ada", ("fp8", "int8")),
        ("ampere", ("int8",)),
        ("cpu", ("int8",)),
        (None, ("int8",)),
    ):
        assert target(name, cpu).formats == formats


def test_measured_rates(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text('{"tflops": {"bf16": 600, "fp8": 900}}')
    measured = with_rates(BLACKWELL, file)
    assert measured.rates == {"nvfp4": 2400, "fp8": 900, "int8": 1200, "bf16": 600}
    assert measured.formats == ("nvfp4", "fp8")
    cost = CostModel(units(300, 100), measured, 1001)
    plain = 1000 * 400 / 2400 + 400 / 600
    with_fp8 = 1000 * (300 / 2400 + 100 / 900) + 400 / 600
    assert cost.time(choice("nvfp4", "fp8")) == pytest.approx(with_fp8 / plain)
