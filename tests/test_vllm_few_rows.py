"""Where the products of a pass's precise rows go, with stand-ins for the GPU's streams and kernels."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from mixquant.engines.vllm import few_rows, linear
from mixquant.phase import PhasePlan, Thresholds, plan_pass

K, N = 16, 24


class Stream:
    def wait_event(self, event: Any) -> None: ...

    record = wait_event


@pytest.fixture(scope="module", autouse=True)
def a_hopper() -> Any:
    """The kernel as it computes; work on two streams in the order in which it is launched."""
    with pytest.MonkeyPatch.context() as patch:
        kernels = pytest.importorskip("mixquant.kernels.few_rows_triton")

        def multiply(x: Tensor, weight: Tensor, out: Tensor, programs: int) -> None:
            assert 0 < len(x) <= kernels.MOST_ROWS == few_rows.MOST_ROWS and programs > 0
            assert x.stride(1) == out.stride(1) == 1 and weight.is_contiguous()
            out.copy_(x.double() @ weight.double().T)

        patch.setattr(kernels, "few_rows", multiply)
        patch.setattr(few_rows, "why_not", lambda: None)
        patch.setattr(few_rows, "LEAST_BESIDE", 40)
        patch.setattr(few_rows, "_side", lambda device: (Stream(), Stream(), Stream()))
        patch.setattr(few_rows, "_multiprocessors", lambda: 132)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield


@st.composite
def plans(draw: st.DrawFn) -> PhasePlan:
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 70), st.integers(1, 60)), min_size=1, max_size=6)
    )
    prompts = [first + count - draw(st.integers(0, 3)) for first, count in sequences]
    padding = draw(st.sampled_from([0, 0, 5]))
    thresholds = Thresholds(0, draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    return plan_pass(
        thresholds,
        np.array([*(first for first, _ in sequences), -padding]),
        np.array([*(count for _, count in sequences), padding]),
        np.array([*(max(0, prompt) for prompt in prompts), 0]),
    )


@settings(deadline=None)
@given(plans())
def test_precise_rows_are_precise_and_the_others_are_not(plan: PhasePlan) -> None:
    few = few_rows.few_rows_of(plan, torch.bfloat16)
    if not plan.quantized or not 0 < plan.precise_rows <= few_rows.MOST_ROWS:
        assert few is None
        return
    assert few is not None
    assert few_rows.few_rows_of(plan, torch.float16) is None
    padded = plan.quantized_rows + plan.precise_rows < plan.rows
    assert few.beside == (plan.quantized_rows >= 40 and few.place is not None and not padded)
    torch.manual_seed(0)
    flat = torch.randn(plan.rows, K).bfloat16()
    layer = SimpleNamespace(weight=torch.randn(N, K).bfloat16())
    method = SimpleNamespace(input_of=lambda x: x)
    out = torch.full((plan.rows, N), torch.nan).bfloat16()

    def quantized() -> None:
        """Writes what the layer's quantized product would, into other rows as well."""
        if padded:
            out.zero_()
        together = linear.computed_together(plan)
        for start, stop in [together] if together else plan.quantized:
            out[start:stop] = 7

    if few.beside:
        with few.beside_quantized(flat, layer, method, out):
            quantized()
    else:
        quantized()
        few.after_quantized(flat, layer, method, out)
    wanted = (flat.double() @ layer.weight.double().T).bfloat16()
    for start, stop in plan.precise:
        assert torch.equal(out[start:stop], wanted[start:stop])
    for start, stop in plan.quantized:
        assert (out[start:stop] == 7).all()


def test_written_meanwhile_only_where_the_quantized_product_does_not() -> None:
    """The quantized product may write after the kernel did."""
    alone = plan_pass(Thresholds(), [0], [60], [60])
    with_decode_row = plan_pass(Thresholds(), [99, 0], [1, 60], [99, 60])
    for plan, place in ((alone, (59, 60)), (with_decode_row, None)):
        few = few_rows.few_rows_of(plan, torch.bfloat16)
        assert few is not None and few.place == place and few.beside == bool(place)
    assert linear.computed_together(alone) == (0, 59)
    assert linear.computed_together(with_decode_row) == (0, 61)


def test_elsewhere_precise_rows_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_pass(Thresholds(), [0], [60], [60])
    monkeypatch.setattr(few_rows, "why_not", lambda: "needs another GPU")
    assert few_rows.few_rows_of(plan, torch.bfloat16) is None
    assert linear.computed_together(plan) == (0, 60)
