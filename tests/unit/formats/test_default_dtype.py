"""Formats under another default dtype: vLLM sets it to the model's while a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mixquant.formats import BY_NAME, int8, native_formats

CPU = torch.device("cpu")


@pytest.fixture
def in_bf16() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(default)


def test_what_is_native_does_not_depend_on_it(in_bf16: None) -> None:
    """INT8 was taken for emulated in vLLM's workers, which ask first while they load a model."""
    in_a_worker = int8._onednn_multiplies.__wrapped__()
    assert in_a_worker == int8._onednn_multiplies()
    torch.set_default_dtype(torch.float32)
    assert in_a_worker == int8._onednn_multiplies.__wrapped__()
    assert ("int8" in native_formats(CPU)) == in_a_worker


@pytest.mark.parametrize("name", BY_NAME)
def test_products_do_not_depend_on_it(name: str, in_bf16: None) -> None:
    fmt, kernel = BY_NAME[name], BY_NAME[name].kernel(CPU)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)
        out = torch.empty(40, 48, dtype=torch.bfloat16)
        quantized = fmt.quantize_weight(weight, kernel)
        fmt.linear(fmt.quantize_rows(x, kernel), quantized, None, out)
        found += [(out, fmt.dequantize_weight(quantized))]
    (a, b), (c, d) = found
    assert torch.equal(a, c) and torch.equal(b, d)
