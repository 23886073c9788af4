"""`phase_linear` against a reference that goes row by row, under random plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixquant.core.phase import PhasePlan, everything_quantized
from mixquant.core.rows import Part, index_of, phase_linear
from mixquant.engines.transformers.module import quantize_parts
from mixquant.formats import BY_NAME

K = 32
FORMATS = ("int8", "fp8", "nvfp4", "bf16")
Layout = tuple[tuple[tuple[int, int], str, dict[str, Any]], ...]

relaxed = settings(deadline=None, max_examples=up_to(60))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ranges(kinds: str, wanted: str) -> tuple[tuple[int, int], ...]:
    """Where in a string of row kinds the runs of one kind are."""
    found: list[tuple[int, int]] = []
    for row, kind in enumerate(kinds):
        if kind == wanted:
            if found and found[-1][1] == row:
                found[-1] = (found[-1][0], row + 1)
            else:
                found.append((row, row + 1))
    return tuple(found)


def plan_of(kinds: str) -> PhasePlan:
    """The plan of rows that are each quantized (q), precise (p) or padding (.)."""
    return PhasePlan(len(kinds), ranges(kinds, "q"), ranges(kinds, "p"))


def layout_of(*pieces: tuple[int, str]) -> Layout:
    layout: Layout = ()
    start = 0
    for features, name in pieces:
        layout += (((start, start + features), name, {}),)
        start += features
    return layout


def row_by_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Part, ...], kinds: str
) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[0])
    for row, kind in enumerate(kinds):
        one = x[row : row + 1]
        if kind == "p":
            out[row : row + 1] = F.linear(one, weight, bias)
        elif kind == "q":
            for part in parts:
                first, last = part.features
                b = None if bias is None else bias[first:last]
                if part.weight is None:
                    out[row : row + 1, first:last] = F.linear(one, weight[first:last], b)
                    continue
                fmt = BY_NAME[part.format]
                rows = fmt.quantize_rows(one, part.weight.kernel, **part.options)
                piece = x.new_empty(1, last - first)
                fmt.linear(rows, part.weight, b, piece)
                out[row : row + 1, first:last] = piece
    return out


def assert_rows(out: Tensor, wanted: Tensor, kinds: str) -> None:
    # Products of BF16 and of emulated formats may be summed in another order: one rounding.
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-6)
    for row, kind in enumerate(kinds):
        if kind == ".":
            assert (out[row] == 0).all()


@given(
    kinds=st.text(alphabet="qp.", min_size=1, max_size=40),
    pieces=st.lists(st.tuples(st.integers(1, 5), st.sampled_from(FORMATS)), min_size=1, max_size=3),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
@relaxed
def test_each_row_is_multiplied_as_its_plan_says(
    kinds: str, pieces: list[tuple[int, str]], biased: bool, seed: int
) -> None:
    layout = layout_of(*((16 * features, name) for features, name in pieces))
    features = layout[-1][0][1]
    weight = random(features, K, seed=seed)
    bias = random(features, seed=seed + 1) if biased else None
    parts = quantize_parts(weight, layout)
    x = random(len(kinds), K, seed=seed + 2)
    out = phase_linear(x, weight, bias, parts, plan_of(kinds))
    if "q" not in kinds:  # then the layer is an ordinary one, padding and all
        assert torch.equal(out, F.linear(x, weight, bias))
        return
    assert (out.dtype, out.shape) == (torch.bfloat16, (len(kinds), features))
    assert_rows(out, row_by_row(x, weight, bias, parts, kinds), kinds)


def test_quantized_and_precise_rows_differ_by_more_than_the_tolerance_above() -> None:
    """Or rows taken for one another would pass."""
    weight, x = random(64, K), random(40, K, seed=1)
    precise = F.linear(x, weight)
    for name in ("int8", "fp8", "nvfp4"):
        parts = quantize_parts(weight, layout_of((64, name)))
        quantized = phase_linear(x, weight, None, parts, everything_quantized(40))
        apart = (quantized - precise).abs() > 2**-6 + 2**-7 * precise.abs()
        assert apart.any(dim=1).all()


def test_int8_rows_are_bit_equal_under_any_plan() -> None:
    weight, x = random(64, K), random(40, K, seed=1)
    parts = quantize_parts(weight, layout_of((64, "int8")))
    alone = phase_linear(x, weight, None, parts, everything_quantized(40))
    for kinds in ("q" * 20 + "p" * 20, "pq" * 20, "." * 5 + "q" * 34 + "p", "pqqq" * 10):
        out = phase_linear(x, weight, None, parts, plan_of(kinds))
        quantized = [row for row, kind in enumerate(kinds) if kind == "q"]
        assert torch.equal(out[quantized], alone[quantized])


@pytest.mark.parametrize("shape", [(2, 5, K), (1, 10, K), (10, 1, K), (2, 1, 5, K)])
def test_leading_dimensions_are_flattened_and_kept(shape: tuple[int, ...]) -> None:
    weight = random(48, K)
    parts = quantize_parts(weight, layout_of((32, "int8"), (16, "bf16")))
    kinds = "..pqqqpqqp"
    x = random(*shape, seed=1)
    out = phase_linear(x, weight, None, parts, plan_of(kinds))
    assert out.shape == (*shape[:-1], 48)
    wanted = row_by_row(x.reshape(10, K), weight, None, parts, kinds)
    assert_rows(out.reshape(10, 48), wanted, kinds)


def test_rows_that_are_not_contiguous() -> None:
    weight = random(48, K)
    parts = quantize_parts(weight, layout_of((48, "int8")))
    kinds = "..pqqqpqqp"
    wide = random(5, 2, 3 * K, seed=1)
    for x in (wide[..., K : 2 * K], wide.transpose(0, 1)[..., :K]):
        out = phase_linear(x, weight, None, parts, plan_of(kinds))
        wanted = row_by_row(x.reshape(10, K), weight, None, parts, kinds)
        assert_rows(out.reshape(10, 48), wanted, kinds)


def test_everything_is_precise_without_a_plan_that_fits() -> None:
    weight, bias = random(48, K), random(48, seed=2)
    parts = quantize_parts(weight, layout_of((48, "int8")))
    x = random(10, K, seed=1)
    wanted = F.linear(x, weight, bias)
    for plan in (
        None,
        everything_quantized(9),
        everything_quantized(11),  # another row count: a vision tower's, say
        plan_of("p" * 10),
        PhasePlan(10, (), ()),
    ):
        assert torch.equal(phase_linear(x, weight, bias, parts, plan), wanted)
    assert not torch.equal(phase_linear(x, weight, bias, parts, everything_quantized(10)), wanted)


# --- quantize once, use for all layers that read the same rows --------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats whose `quantize_rows` was called."""
    made: list[str] = []

    def watch(kind: type) -> None:
        original = kind.quantize_rows  # type: ignore[attr-defined]

        def quantize_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(self.name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "quantize_rows", quantize_rows)

    for fmt in BY_NAME.values():
        watch(type(fmt))
    return made


def test_rows_are_quantized_once_for_the_layers_that_share_them(calls: list[str]) -> None:
    weights = [random(48, K, seed=seed) for seed in range(3)]
    layers = [(w, quantize_parts(w, layout_of((48, "int8")))) for w in weights]
    x = random(20, K, seed=5)
    plan = plan_of("p" + "q" * 18 + "p")
    shared = [phase_linear(x, w, None, parts, plan) for w, parts in layers]
    assert calls == ["int8"]
    for (w, parts), out in zip(layers, shared, strict=True):
        assert torch.equal(out, phase_linear(x, w, None, parts, plan_of("p" + "q" * 18 + "p")))
    # Another format, another activation, and another plan are quantized for themselves.
    calls.clear()
    phase_linear(x, weights[0], None, quantize_parts(weights[0], layout_of((48, "fp8"))), plan)
    phase_linear(x.clone(), *layers[0][:1], None, layers[0][1], plan)
    phase_linear(x, *layers[0][:1], None, layers[0][1], plan_of("q" * 20))
    assert calls == ["fp8", "int8", "int8"]


@pytest.mark.parametrize("through", ["itself", "a view", "its base"])
@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4"])
def test_rows_that_were_written_to_are_quantized_again(name: str, through: str) -> None:
    weight = random(48, K)
    parts = quantize_parts(weight, layout_of((48, name)))
    base = random(40, K, seed=1)
    x = base[10:30] if through == "its base" else base[10:30].clone()
    plan = everything_quantized(20)
    before = phase_linear(x, weight, None, parts, plan)
    if through == "itself":
        x.mul_(-2)
    elif through == "a view":
        x[:, :5].add_(1)
    else:
        base.mul_(-2)
    after = phase_linear(x, weight, None, parts, plan)
    assert torch.equal(after, phase_linear(x, weight, None, parts, everything_quantized(20)))
    assert not torch.equal(after, before)


def test_inference_tensors_are_quantized_anew_each_time() -> None:
    """They have no version that would tell whether they were written to."""
    weight = random(48, K)
    parts = quantize_parts(weight, layout_of((48, "int8")))
    with torch.inference_mode():
        x = random(20, K, seed=1)
        plan = plan_of("q" * 19 + "p")
        before = phase_linear(x, weight, None, parts, plan)
        assert torch.equal(before, phase_linear(x, weight, None, parts, plan))
        x.mul_(-1)
        after = phase_linear(x, weight, None, parts, plan)
    assert torch.equal(after, -before)


def test_a_plan_serves_activations_of_several_widths() -> None:
    """As within a layer: attention's rows, then the wider ones of the MLP, then the next layer's."""
    narrow, wide = random(48, K), random(48, 2 * K, seed=1)
    plan = plan_of("..pqqqpqqp")
    fresh = "..pqqqpqqp"
    for seed in range(3):
        for weight in (narrow, wide):
            parts = quantize_parts(weight, layout_of((48, "int8")))
            x = random(10, weight.shape[1], seed=10 + seed)
            out = phase_linear(x, weight, None, parts, plan)
            assert torch.equal(out, phase_linear(x, weight, None, parts, plan_of(fresh)))


def test_parts_with_other_options_do_not_share_rows() -> None:
    """4/6 is another quantization of the same rows."""
    weight = random(64, K)
    layout: Layout = (
        ((0, 32), "nvfp4", {"block_scale": "6"}),
        ((32, 64), "nvfp4", {"block_scale": "4/6"}),
    )
    parts = quantize_parts(weight, layout)
    x = random(20, K, seed=1)
    out = phase_linear(x, weight, None, parts, everything_quantized(20))
    wanted = row_by_row(x, weight, None, parts, "q" * 20)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-7)


def test_row_numbers_are_on_the_device_of_the_rows() -> None:
    """The meta device stands in for MPS or XPU, which take no index from the CPU."""
    plan = plan_of("qqpqpp")
    assert index_of(plan, "quantized", torch.device("meta")).device.type == "meta"
    assert index_of(plan, "quantized", torch.device("cpu")).tolist() == [0, 1, 3]
