"""Rows that passes quantize are counted pass by pass, and none where no layer is quantized."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from mixquant import Recipe, prepare
from mixquant.engines.transformers.counting import quantized_rows


@pytest.mark.parametrize(("fmt", "expected"), [("fp8", [39, 0]), ("bf16", [0, 0]), (None, [0, 0])])
@torch.no_grad()
def test_rows_of_each_pass(fmt: str | None, expected: list[int]) -> None:
    model = tiny_models.build("llama")
    if fmt is not None:
        prepare(model, Recipe.from_dict({"format": fmt, "min_prefill_tokens": 8}))
    prompt = torch.zeros(1, 40, dtype=torch.long)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    with quantized_rows(model) as rows:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert rows == expected  # of the prompt all but its precise tail, and of the answer none
    model(input_ids=prompt)
    assert rows == expected  # nothing is counted after the block
